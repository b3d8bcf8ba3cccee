"""instructor: objects by a tool that must be called, and by a JSON schema."""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

url, key = sys.argv[1:]


class Weather(BaseModel):
    """The weather."""

    unit: Literal["C", "F"]


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=key), mode=mode)
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "red cat"}],
        response_model=Weather,
        temperature=0,
        max_tokens=300,
        max_retries=0,
    )
    assert found.unit in ("C", "F")
