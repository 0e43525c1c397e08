"""Every interaction block through the ONNX converter and ONNX Runtime, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_interaction import CASES, FIELDS, X0, F, apply, config, random_params

pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')

from pinfm_jax.model.interaction.build import interaction_block  # noqa: E402
from pinfm_jax.model.interaction.fields import FieldInputs  # noqa: E402
from pinfm_jax.serve.portable.onnx.convert import to_onnx  # noqa: E402

MODULES = {
  name: lambda case=case: interaction_block(config(case[0], **case[1]), FIELDS) for name, case in CASES.items()
}
MODULES['field inputs'] = lambda: FieldInputs(FIELDS, most_width=4, norm=True, gates=True)
MODULES['side by side'] = lambda: interaction_block(config('fm', parallel=2, deep=(5,)), FIELDS)


@pytest.mark.parametrize('name', MODULES)
def test_a_block_has_an_onnx_form(name):
  module = MODULES[name]()
  params = random_params(module)
  shapes = {'x0': jax.ShapeDtypeStruct(export.symbolic_shape(f'U, C, {F}'), jnp.float32)}
  model = to_onnx(lambda p, given: {'out': module.apply({'params': p}, given['x0'])}, params, shapes, 'test')
  found = ort.InferenceSession(model.SerializeToString()).run(['out'], {'x0': X0})[0]
  np.testing.assert_allclose(found, apply(module, params), rtol=1e-3, atol=1e-4)
