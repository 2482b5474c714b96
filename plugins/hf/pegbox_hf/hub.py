"""Asking the Hugging Face hub, once and without retries, whether it has a model.

A name that is neither a folder nor a repository is the commonest mistake of all; left to the libraries, a machine
without a connection would take half a minute to say so, and say it differently.
"""

from __future__ import annotations

from pegbox.errors import UserError

from pegbox_hf.source import CONFIG, Source

TIMEOUT_S = 10.0


def reachable(source: Source) -> bool:
    """Whether the hub answers; if it does not, the model is in the hub's cache.

    Raises:
        UserError: no such repository or revision, no permission, or no connection and nothing cached.
    """
    import httpx
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    name = source.name
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=source.revision), timeout=TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise UserError(
            f"the hub does not let you read '{name}'",
            "Its owner asks for consent first.",
            "Accept it there, then type: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"'{name}' has no revision '{source.revision}'",
            "The hub knows no such branch, tag or commit.",
            "Correct model.revision.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model '{name}' on the hub, or it is private",
            "No folder of this name exists either.",
            "Correct model.name; for a private repository type: hf auth login",
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"the repository '{name}' has no {CONFIG}", "It is not in transformers' layout.", "Correct model.name."
        ) from error
    except (OSError, httpx.HTTPError) as error:
        if isinstance(try_to_load_from_cache(name, CONFIG, revision=source.revision), str):
            return False
        raise UserError(
            f"no model '{name}': no folder of this name exists, and the hub cannot be reached",
            "The hub's cache does not hold it either; a hub model is downloaded once.",
            "Connect and try again, or set model.name to a local folder or GGUF file.",
        ) from error
    return True
