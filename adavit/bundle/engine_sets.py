"""TensorRT engines in a bundle: sets by flavour, version, platform, compute capability and precision, side by side.

A set is for the machine it was built for, and has an engine for every graph of one precision. Blocks may have a second
one, of the heads that images usually keep. What does not fit is found out here, before TensorRT sees a byte.
"""

from __future__ import annotations

import zlib
from contextlib import suppress

from adavit.bundle.bundle import Bundle, GraphFiles
from adavit.bundle.engine_set import EngineSet, Machine, StoredEngine
from adavit.bundle.engine_set_reading import read_engine_set
from adavit.bundle.graph_keys import GraphKey, stored_graph
from adavit.bundle.trust import built_here
from adavit.errors import BackendError, BundleError
from adavit.files import sha256

__all__ = ["engine_sets", "find_engine_set", "packed_engine", "read_engine", "source_of"]


def source_of(files: GraphFiles, key: GraphKey) -> str:
    """Tells what an engine is built from: a hash of the graph's hash and that of the weights."""
    return sha256(f"{stored_graph(files, key).sha256} {files.weights.sha256}".encode())


def find_engine_set(bundle: Bundle, machine: Machine, precision: str, trust_engines: bool = False) -> EngineSet:
    """The bundle's set for a machine: of those for its compute capability the last built, else one for newer GPUs.

    Args:
        bundle: where the sets are.
        machine: what is to run one.
        precision: of the graphs that are to run.
        trust_engines: take one that this user did not build on this machine, too.

    Raises:
        BundleError: the description of a set is damaged.
        BackendError: there is none, or none to trust; the message names both sides and the command that builds one.
    """
    sets = engine_sets(bundle)
    found = [engines for engines in sets if engines.precision == precision and engines.fits(machine)]
    trusted = [engines for engines in found if trust_engines or built_here(engines.fingerprint)]
    if trusted:
        return min(reversed(trusted), key=lambda engines: engines.hardware_compatible)
    command = f"adavit-export {bundle.path} --target {machine.flavour}"
    if machine.flavour == "tensorrt-rtx":
        capability = machine.compute_capability
        command = f"adavit-export {bundle.path} --target tensorrt-rtx --compute-capability {capability}"
    if found:
        raise BackendError(
            f"{bundle.path}: its engines {found[0].key} came with it and were not built by this user on this machine; "
            f"TensorRT engines are native code: if you trust who built them, give "
            f"`trust_engines=True`, else build them here, run: {command}"
        )
    there = "; ".join(str(engines) for engines in sets if engines.flavour == machine.flavour)
    raise BackendError(
        f"{bundle.path}: its engines are for {there or 'no ' + machine.flavour}, this machine is {machine} and runs "
        f"{precision}; run: {command}"
    )


def engine_sets(bundle: Bundle) -> list[EngineSet]:
    """All sets of a bundle; raises BundleError where their description is damaged."""
    try:
        described = bundle.config.get("engine_sets", {}).items()
        return [read_engine_set(key, values, bundle.architecture.heads) for key, values in described]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path}/config.json: its engine_sets are damaged ({error}); remove the set that is, or export "
            "again, and build the engines again"
        ) from None


def packed_engine(engine: bytes) -> bytes:
    """An engine as it is stored: much of it is source code of kernels, which repeats itself."""
    return zlib.compress(engine, 1)


def read_engine(bundle: Bundle, stored: StoredEngine) -> bytes:
    """Reads an engine, checks it against its hash, and unpacks it; raises BundleError where it is damaged."""
    unpacker, found = zlib.decompressobj(), b""
    packed = bundle.read_stored(stored)
    with suppress(zlib.error):
        found = unpacker.decompress(packed, stored.unpacked_bytes + 1)  # one more finds the end
    if not unpacker.eof or len(found) != stored.unpacked_bytes:
        raise BundleError(f"{bundle.path}/{stored.file}: is no packed engine; build the engines again")
    return found
