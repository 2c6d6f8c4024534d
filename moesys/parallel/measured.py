"""Reads which nodes are near each other from a file of `moesys doctor --cluster --json`, named in MOESYS_LINKS."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesys.parallel.nearness import Link, measured_addresses

LINKS_VARIABLE = "MOESYS_LINKS"
_MAKE_IT = "make it with: srun moesys doctor --cluster --json > FILE"


def addresses_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The address of each node that was measured; {} where nobody asks for it.

    Raises:
        ValueError: the file cannot be read, or is another one.
    """
    name = environ.get(LINKS_VARIABLE)
    if not name:
        return {}
    try:
        said = json.loads(Path(name).read_text(encoding="utf-8"))
        links = [_link(one) for one in said["links"]]
    except OSError as error:
        raise ValueError(
            f"{LINKS_VARIABLE}={name} cannot be read ({error.strerror}): {_MAKE_IT}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{LINKS_VARIABLE}={name} is not what the doctor writes ({what}): {_MAKE_IT}"
        ) from error
    nodes = list(dict.fromkeys(node for link in links for node in link.nodes))
    return measured_addresses(nodes, links)


def _link(said: Mapping[str, Any]) -> Link:
    a, b = map(str, said["nodes"])
    link = Link(
        nodes=(a, b),
        gbit_per_s=float(said["gbit_per_s"]),
        round_trip_us=float(said["round_trip_us"]),
    )
    if not (link.gbit_per_s > 0 and link.round_trip_us >= 0):
        raise ValueError(
            f"{a} to {b}: {link.gbit_per_s:g} Gbit/s, a round trip of {link.round_trip_us:g} us"
        )
    return link
