"""Finding AI-generated images and AI-manipulated regions: the library behind the notebooks."""
