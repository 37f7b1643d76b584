"""Write tasks of lm-eval of each kind, as a user would write them."""

from __future__ import annotations

import json
from pathlib import Path

CITIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens of old",
    "Japan": "Tokyo",
    "Cuba": "a",
}


def write_definitions(directory: Path) -> None:
    """Write the definitions of tasks and their data to a directory."""
    rows = [
        {"country": country, "city": number, "text": f"the city of {country} is {city}."}
        for number, (country, city) in enumerate(CITIES.items())
    ]
    (directory / "cities.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/cities.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
"""
    choice = f"doc_to_target: city\ndoc_to_choice: {json.dumps(list(CITIES.values()))}\noutput_type: multiple_choice\n"
    accuracy = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    for name, text in {
        "choice": f'{choice}{accuracy}doc_to_text: "the city of {{{{country}}}} is"\n',
        "unconditional": f'{choice}{accuracy}doc_to_text: ""\ntarget_delimiter: ""\n',
        "shots": f'{choice}{accuracy}doc_to_text: "the city of {{{{country}}}} is"\nfewshot_split: test\n',
        "completion": 'output_type: loglikelihood\ndoc_to_text: "{{country}}"\ndoc_to_target: " {{text}}"\n'
        "metric_list: [{metric: perplexity}, {metric: acc}]\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
        "generation": 'output_type: generate_until\ndoc_to_text: "{{country}}"\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: exact_match}]\n",
    }.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
