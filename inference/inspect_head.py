"""`eagle inspect head PATH`: format, geometry, layer ids, draft vocabulary, and what the head
belongs to.
"""

from __future__ import annotations

from json import dumps

from configs.cli import main
from eagle.errors import EagleError


def inspect_head(
    *folders: str, json: bool = False, from_format: str | None = None, target: str | None = None
) -> int:
    """Describe the head in a folder, in any format. --json prints one JSON object. --target: also
    what differs from what the head was trained for; the exit status is then 1."""
    from eagle.checkpoint import find_folder, require_fit
    from eagle.heads.describe import describe, facts
    from eagle.heads.read import read_folder
    from eagle.loading import differences
    from inference.convert import load_target

    if len(folders) != 1:
        raise EagleError("give one head folder: eagle inspect head PATH")
    published = read_folder(find_folder(folders[0], "head"), from_format)
    said, found = describe(published), []
    if target is not None:
        loaded = load_target(target)
        config, _ = published.parse(published.layers(len(loaded.layers)))
        require_fit(published.path, config, loaded)
        record = published.provenance
        found = differences({**record, **(record.get("target") or {})}, loaded.identity)
    if json:
        print(dumps(said | ({} if target is None else {"differences": found})))
        return 1 if found else 0
    print("\n".join(f"{name:<13} {value}" for name, value in facts(said).items()))
    if target is not None:
        print("\n".join(f"differs: {d}" for d in found) or "fits this target")
    return 1 if found else 0


if __name__ == "__main__":
    main(inspect_head, name="eagle inspect head")
