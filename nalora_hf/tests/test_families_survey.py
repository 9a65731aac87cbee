"""What the survey of transformers' families found is what MODELS.md and README.md say."""
from nalora_hf import read_json, survey

def test_the_families_in_the_documents_are_those_of_the_survey():
    rows = read_json(survey.PACKAGE / "MODELS.json")
    text = (survey.PACKAGE / "MODELS.md").read_text(encoding="utf-8")
    assert f"{survey.MARK}\n{survey.report(rows)}\n{survey.END}" in text
    outcomes = [row["outcome"] for row in rows.values()]
    assert outcomes.count("steered") >= 80 and "wrong" not in outcomes
    text = (survey.PACKAGE / "README.md").read_text(encoding="utf-8")
    assert (f"Of the {len(rows)} causal language models" in text
            and f"{outcomes.count('steered')} gated ones" in text
            and f"{outcomes.count('ungated')} without a gate" in text)
