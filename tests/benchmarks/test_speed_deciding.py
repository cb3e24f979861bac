"""What the pool teaches costs what is said: every way to decide is measured on the same samples."""

from tests.benchmarks.speed_deciding import WAYS, DecidingSpeed, times


def test_every_way_to_decide_is_timed():
    found = times(DecidingSpeed(num_samples=400, num_calibration=300, width=8, repeats=1))
    assert list(found) == [*WAYS]
    assert all(0 < seconds < 60 for seconds in found.values())
