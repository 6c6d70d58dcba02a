"""What a server tells of those whom its gateway turns away."""

import time

from federa.flower.gateway import REFUSED
from federa.flower.serve import MOST_REFUSALS, retold


def test_refusals_are_told_once_each(tmp_path):
    log, told = tmp_path / "gateway.log", []
    log.write_text(f"started\n{REFUSED} 1.2.3.4: it has no key\n")
    with retold(log, told.append):
        while not told:
            time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"{REFUSED} 1.2.3.4: it has no key\n{REFUSED} a caller: no TLS with it\n")
    assert told == [f"{REFUSED} 1.2.3.4: it has no key", f"{REFUSED} a caller: no TLS with it"]


def test_a_flood_of_refusals_is_cut(tmp_path):
    log, told = tmp_path / "gateway.log", []
    log.write_text(
        "".join(f"{REFUSED} 10.0.{n // 256}.{n % 256}: no key\n" for n in range(3 * MOST_REFUSALS))
    )
    with retold(log, told.append):
        pass
    assert len(told) == MOST_REFUSALS
