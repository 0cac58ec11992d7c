"""Reports of errors."""
from runtime.errors import error_report


def test_a_report_takes_any_text(E):
    """Percent signs and braces in a setting are text."""
    error = E.RunnerError("no such variant")
    error.add_note("checking the settings")
    about = "SAE_VARIANT = 'top%s{k}%'"
    assert error_report(error, E.__file__, about, E.SAE).splitlines() == [
        f"experiment.py failed in: checking the settings; {about}", "no such variant"]
