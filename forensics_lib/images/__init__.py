"""Images: reading files, masks, crops, degradations and spectra."""
