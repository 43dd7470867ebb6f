"""The command line: exit statuses for scripts."""

from workbench.cli import main


def test_fetch_and_check(capsys):
    assert main(["fetch", "smollm2-135m"]) == 0
    assert "is ready in" in capsys.readouterr().out
    assert main(["check", "smollm2-135m", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith("noise")


def test_bad_input_is_status_2_in_one_line(capsys):
    for arguments in (
        ["fetch", "no-such-model"],
        ["check", "smollm2-135m", "--engine", "x"],
        ["check", "smollm2-135m", "--dtype", "int8"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("workbench: ")
        assert captured.err.count("\n") == 1
