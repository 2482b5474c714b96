"""The section `hub` of a config. It holds no token: that is the library's login."""

from __future__ import annotations

from pegbox.section import Section, setting


class HubConfig(Section):
    """Where a finished run goes."""

    repo: str = setting(..., "The repository, as owner/name.", pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    private: bool = setting(True, "Make it private if it does not exist yet; one that exists stays as it is.")
    revision: str | None = setting(None, "Branch to push to; it is made if it does not exist.", min_length=1)
    record: bool = setting(
        False, "Push the record of the run too: config.yaml, run.json, metrics.jsonl and samples, which name your data."
    )
    endpoint: str | None = setting(
        None, "Address of the hub; the library's unless set.", pattern=r"^https?://[^/]+(/.*)?$"
    )
