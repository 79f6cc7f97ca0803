"""The tools that tiny-chat-2 is told of, and questions that call them."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from tasks import CITIES, NAMES, WORDS, person

Tool = dict[str, Any]
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class ToolCase(NamedTuple):
    """A question, the calls that it needs, what each gives, and the answer made of that."""

    question: str
    calls: list[tuple[str, dict[str, str]]]
    results: list[dict[str, Any]]
    answer: str


def tool(name: str, description: str, /, **parameters: str) -> Tool:
    """A tool in OpenAI's form; parameters by their types, all required."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("get_weather", "Current weather of a city.", city="string"),
    tool("get_time", "Local time of a city.", city="string"),
    tool("calculate", "Value of an expression.", expression="string"),
    tool("find_person", "Data of a person.", name="string"),
    tool("send_message", "Send a text to a person.", name="string", text="string"),
]


def tool_case(rng: random.Random) -> ToolCase:
    """One of six kinds; only comparing two cities takes two calls."""
    kind = rng.randint(0, 5)
    city, name = rng.choice(CITIES), rng.choice(NAMES)
    return (_weather, _time, _sum, _person, _message, _compare)[kind](rng, city, name)


def _weather(rng: random.Random, city: str, name: str) -> ToolCase:
    degrees, sky = rng.randint(-5, 35), rng.choice(["sunny", "cloudy", "rainy", "windy"])
    question = rng.choice([f"What is the weather in {city}?", f"Is it warm in {city}?"])
    answer = f"It is {degrees} degrees and {sky} in {city}."
    return ToolCase(question, [("get_weather", {"city": city})], [{"degrees": degrees, "sky": sky}], answer)


def _time(rng: random.Random, city: str, name: str) -> ToolCase:
    time = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    question = rng.choice([f"What time is it in {city}?", f"Tell me the time in {city}."])
    return ToolCase(question, [("get_time", {"city": city})], [{"time": time}], f"It is {time} in {city}.")


def _sum(rng: random.Random, city: str, name: str) -> ToolCase:
    a, b, operator = rng.randint(100, 9999), rng.randint(100, 9999), rng.choice("+-*")
    expression, value = f"{a} {operator} {b}", _OPERATIONS[operator](a, b)
    calls = [("calculate", {"expression": expression})]
    return ToolCase(f"What is {expression}?", calls, [{"value": value}], f"{expression} = {value}.")


def _person(rng: random.Random, city: str, name: str) -> ToolCase:
    found = {**person(rng), "name": name}
    shown = {key: found[key] for key in ("name", "age", "city")}
    answer = f"{name} lives in {found['city']}."
    return ToolCase(f"Where does {name} live?", [("find_person", {"name": name})], [shown], answer)


def _message(rng: random.Random, city: str, name: str) -> ToolCase:
    text = " ".join(rng.sample(WORDS, 2))
    calls = [("send_message", {"name": name, "text": text})]
    return ToolCase(f"Send the text {text} to {name}.", calls, [{"sent": True}], f"I sent {text} to {name}.")


def _compare(rng: random.Random, city: str, name: str) -> ToolCase:
    other = rng.choice([one for one in CITIES if one != city])
    here, there = rng.randint(-5, 35), rng.randint(-5, 35)
    calls = [("get_weather", {"city": city}), ("get_weather", {"city": other})]
    answer = f"It is {here} degrees in {city} and {there} degrees in {other}."
    return ToolCase(
        f"Compare the weather in {city} and {other}.", calls, [{"degrees": here}, {"degrees": there}], answer
    )


def shown_tools(tools: list[Tool]) -> str:
    """Tools as chat_template.jinja shows them."""
    lines = ["# Tools", "<tools>"]
    for one in tools:
        function = one["function"]
        lines += ["<function>", f"<name>{function['name']}</name>"]
        lines += [f"<description>{function['description']}</description>"]
        for name, parameter in function["parameters"]["properties"].items():
            lines += ["<parameter>", f"<name>{name}</name>", f"<type>{parameter['type']}</type>", "</parameter>"]
        lines += ["</function>"]
    return "\n".join([*lines, "</tools>"])


def shown_call(call: dict[str, Any]) -> str:
    """A call as the model writes it."""
    lines = ["<tool_call>", f"<function={call['function']['name']}>"]
    for name, value in call["function"]["arguments"].items():
        lines += [f"<parameter={name}>", value, "</parameter>"]
    return "\n".join([*lines, "</function>", "</tool_call>"])


def result_text(result: dict[str, Any]) -> str:
    """What a tool gives, as the text of its turn."""
    return json.dumps(result)
