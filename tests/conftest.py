import pytest


@pytest.fixture
def drag(home, capsys, monkeypatch):
    "Run a command line in this process, in the project folder `home` of the test's module: (exit code, stdout, stderr)."
    from drag_lib import cli
    monkeypatch.setenv('DRAG_HOME', str(home))
    monkeypatch.setenv('DRAG_CACHE', str(home/'cache'))
    monkeypatch.chdir(home)

    def run(line):
        capsys.readouterr()
        code = cli.main(line.split() if isinstance(line, str) else list(line))
        return code, *capsys.readouterr()
    return run
