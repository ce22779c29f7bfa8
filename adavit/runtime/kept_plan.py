"""The plan that was measured on this machine for a bundle and backend, kept for the runtimes to come."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adavit.errors import one_line
from adavit.runtime.backend import Backend, Options
from adavit.runtime.bundle import Bundle
from adavit.runtime.cache import facts, kept_any, kept_at, recall, remember
from adavit.runtime.plan import EnginePlan, ruled

__all__ = ["keep_plan", "recalled_plan"]

log = logging.getLogger(__name__)

KIND = "plan"


def recalled_plan(bundle: Bundle, options: Options, backend: Backend) -> EnginePlan:
    """The plan that was kept for this bundle, backend and machine, or the rule that needs none."""
    arch, rule = bundle.architecture, ruled(bundle.architecture, backend.always_gathers)
    if not kept_any(KIND):
        return rule
    known = _known(bundle, options, backend)
    found = recall(KIND, known)
    if found is None:
        return rule
    try:
        return EnginePlan.from_dict(found.get("gathers"), arch, str(kept_at(KIND, known)))
    except ValueError as error:
        log.warning("%s holds no plan (%s); tune again", kept_at(KIND, known), one_line(error))
        return rule


def keep_plan(
    bundle: Bundle, options: Options, backend: Backend, plan: EnginePlan, measured: Mapping[str, Any]
) -> Path | None:
    """Keeps a plan and what it was measured by; returns where, or None where that is not possible."""
    return remember(KIND, _known(bundle, options, backend), {"gathers": plan.to_dict(), **measured})


def _known(bundle: Bundle, options: Options, backend: Backend) -> dict[str, Any]:
    return {**facts(bundle, options), "backend": backend.name}
