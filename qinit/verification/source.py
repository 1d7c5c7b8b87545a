"""What a run says of its source and what it copied from it, against the source itself."""

from __future__ import annotations

from collections.abc import Generator

from qinit.errors import CheckpointError
from qinit.files.manifest import file_sum
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Target, expert_targets, resolve_targets
from qinit.verification.findings import Finding
from qinit.verification.written import CONFIG, Written, differing


def check_source(written: Written, source: Checkpoint) -> Generator[Finding, None, dict[str, Target]]:
    """Compare what was read with what the report and the configuration say; returns the layers that agree."""
    config = {key: value for key, value in written.config.items() if key != "quantization_config"}
    yield from differing(CONFIG, "differs from the source's: ", source.config, config)
    if source.weight_bytes != written.report.totals.get("bytes_before"):
        what = f"totals: bytes_before, found in the source {source.directory}"
        yield Finding(REPORT_NAME, what, written.report.totals.get("bytes_before"), source.weight_bytes)
    try:
        found = (*resolve_targets(source, written.architecture), *expert_targets(source, written.architecture))
        targets = {target.name: target for target in found}
    except CheckpointError as error:
        yield Finding(REPORT_NAME, f"the source is another model: {error}")
        return {}
    for file in source.companions():
        mine, name = written.directory / file, file.as_posix()
        if not mine.is_file():
            yield Finding(name, "is missing, but the source has it")
        elif file_sum(mine) != file_sum(source.directory / file):
            yield Finding(name, "is not the source's")
    rows = {row.name: row for row in written.report.layers}
    replaced = {tensor.name for name, row in rows.items() if row.kept is None for tensor in targets[name].tensors}
    for name in sorted(source.tensors.keys() - replaced - written.tensors.keys()):
        yield Finding(CONFIG, f"the source's tensor '{name}' is not among the weights")
    for name, row in rows.items():
        if (nbytes := targets[name].nbytes) != row.bytes_before:
            yield Finding(REPORT_NAME, f"{name}: bytes_before, against the source", nbytes, row.bytes_before)
    return targets
