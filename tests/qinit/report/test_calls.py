import ast

import pytest

from qinit.report.calls import from_pretrained


@pytest.mark.parametrize("trusted", [False, True])
def test_a_call_is_python_and_trusts_own_code_only_where_it_is_told_to(trusted):
    call = ast.parse(from_pretrained("AutoModel", '"a", revision="b"', trusted), mode="eval").body
    given = {each.arg: each.value.value for each in call.keywords}
    assert ast.unparse(call.func) == "AutoModel.from_pretrained"
    assert given == {"revision": "b", "dtype": "auto", **({"trust_remote_code": True} if trusted else {})}
