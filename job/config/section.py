"""The base of all settings: frozen, strict about names, documented by the sentence beneath each field."""

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Unknown names are refused, values do not change, descriptions are the docstrings."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def works_only(*values: Any, because: str) -> AfterValidator:
    """Mark a setting of a part that is not built yet: any value but those that work is refused with the reason."""

    def check(value: Any) -> Any:
        if value not in values:
            names = " or ".join("null" if v is None else str(v).lower() if v is False else str(v) for v in values)
            raise ValueError(f"{value} does not work in this version: {because}. Use {names}")
        return value

    return AfterValidator(check)
