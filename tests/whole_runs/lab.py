"""Whole runs of copies of the template, in one cache and on one data set, and what they must leave."""
from copies import copy_template
from processes import Process, run, run_in_turn


class Lab:
    """A folder for copies, a cache that all whole runs of the tests share, and each variant's run, done once."""

    def __init__(self, root, cache, data):
        self.root, self.cache, self.data = root, cache, str(data)

    def copy(self, name, **constants):
        return copy_template(self.root / name, **{"DATASET": self.data} | constants)

    def runs(self, **constants):
        """Returns {name: (folder, Finished)} of runs with these constants {name: {constant: value}}, in one process."""
        folders = {name: self.copy(name, **values) for name, values in constants.items()}
        finished = run_in_turn(list(folders.values()), self.cache)
        return {name: (folder, finished[folder]) for name, folder in folders.items()}

    def run(self, name, **constants):
        """Returns (folder, Finished) of a run in a Python of its own, as a harness starts it."""
        folder = self.copy(name, **constants)
        return folder, run(folder, self.cache, kind=Process)


def succeeded(finished):
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""                     # it is no terminal: no bars, and nothing to say
    return finished


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
