import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from forensics_lib.utils.notebook_cells import assigned_names, parameters_in

OWN = '# Parameters\nparams_file: str = "a"  # the run'
BATCH = OWN + "\nbatch_size = 8"
INJECTED = '# Parameters\nparams_file = "b"\nepochs_head = 3\n'


def test_assigned_names_sees_plain_and_typed_assignments():
    assert assigned_names("# Parameters\na = 1\nb: int = 2\nc.d = 3\nprint(a)") == ["a", "b"]


def test_parameters_are_what_the_parameters_cells_assign():
    cells = ["", "# Parameters\nparams_file = 'a'", "# Parameters\nbatchsize = 8\n", "other = 3"]
    namespace = {"In": cells, "params_file": "a", "batchsize": 8, "other": 3}
    assert parameters_in(namespace) == {"params_file": "a", "batchsize": 8}


@pytest.mark.parametrize(
    ("history", "names"),
    [
        ([BATCH, OWN], {"params_file"}),
        ([BATCH, "x = 1", "run = 2", OWN, "run = 2"], {"params_file"}),
        ([OWN, BATCH], {"params_file", "batch_size"}),
        ([BATCH, INJECTED, "x = 1"], {"params_file", "batch_size", "epochs_head"}),
        ([BATCH, INJECTED, "x = 1", OWN, INJECTED], {"params_file", "epochs_head"}),
        ([BATCH, INJECTED, "x = 1", OWN], {"params_file", "epochs_head"}),
        ([BATCH, INJECTED, "x = 1", "# Parameters\nseed = 4"], {"params_file", "batch_size", "seed"}),
        ([OWN, INJECTED, "x = 1", OWN + "\nseed = 4"], {"params_file", "epochs_head", "seed"}),
        (["# Parameters\nparams_file = 'a'\nseed = 4", "# Parameters\nparams_file = 'a'"], {"params_file"}),
        (["# Parameters\nparams_file = 'a'\nseed = 4", "x = 1", "# Parameters\nparams_file = 'b'"], {"params_file"}),
        ([BATCH, OWN + "\nseed = ("], {"params_file", "batch_size"}),
        ([OWN + "\nseed = (", BATCH], {"params_file", "batch_size"}),
        (["  # Parameters\n" + OWN], {"params_file"}),
    ],
)
def test_a_line_taken_out_of_a_parameters_cell_is_no_longer_in_force(history, names):
    """What a kernel holds: names of every cell that was ever executed."""
    namespace = {"In": ["", *history], "params_file": "a", "batch_size": 8, "epochs_head": 3, "seed": 4, "x": 1, "run": 2}
    assert set(parameters_in(namespace)) == names


def test_a_notebook_whose_parameters_cell_is_executed_again():
    """In a real kernel, with what papermill injects."""
    shell = InteractiveShell(config=Config(HistoryManager={"hist_file": ":memory:"}))
    for source in (BATCH, INJECTED, "x = 1", OWN, "x = 2"):
        shell.run_cell(source, store_history=True).raise_error()
    assert parameters_in(shell.user_ns) == {"params_file": "a", "epochs_head": 3}


def test_without_a_history_every_plain_value_counts():
    namespace = {"In": [""], "Out": {}, "_dh": [], "open": open, "params_file": "a", "epochs_head": 1}
    assert parameters_in(namespace) == {"params_file": "a", "epochs_head": 1}
