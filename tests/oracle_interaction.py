"""The interaction blocks in NumPy float64, one example and one field at a time, from their papers' formulas."""

import math

import numpy as np

from pinfm_jax.config import RankerConfig
from pinfm_jax.model.interaction.fields import Fields, total_width

EPSILON = 1e-6


def interaction_width(config: RankerConfig, fields: Fields) -> int:
  """Width of the configured block's output."""
  block, layers = config.block, config.cross_layers
  of_kind = {
    'masknet_serial': block.width,
    'masknet_parallel': block.blocks * block.width,
    'final': block.blocks * block.width,
    'finalmlp': block.outputs,
    'dhen': block.width,
    'transformer': len(fields) * block.token_width,
    'autoint': len(fields) * block.token_width,
    'cin': layers * block.maps,
    'fm': block.token_width,
    'mlp': block.width if layers else total_width(fields),
  }
  width = of_kind.get(config.interaction, total_width(fields))  # the others keep it
  return block.parallel * width + (block.deep[-1] if block.deep else 0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(p, x):
  return x @ p['kernel'] + p.get('bias', 0.0)


def layer_norm(p, x):
  return (x - x.mean()) / np.sqrt(x.var() + EPSILON) * p['scale'] + p['bias']


def of_fields(fields, x):
  return [x[f.start : f.start + f.width] for f in fields]


def tokens(p, fields, x):
  """Vectors of the fields; neighbours of one width share an array of kernels."""
  made, run, place, last = [], -1, 0, None
  for part in of_fields(fields, x):
    run, place = (run + 1, 0) if len(part) != last else (run, place + 1)
    last = len(part)
    made.append(part @ p[f'kernel_{run}'][place] + p[f'bias_{run}'][place])
  return np.array(made)


def field_norm(p, fields, x):
  normed = [part if len(part) == 1 else (part - part.mean()) / np.sqrt(part.var() + EPSILON)
            for part in of_fields(fields, x)]  # fmt: skip
  return np.concatenate(normed) * p['scale'] + p['bias']


def dcnv2(p, x0, layers):
  x = x0
  for i in range(layers):
    x = x0 * linear(p[f'Dense_{i}'], x) + x
  return x


def low_rank(p, x0, layers, activation):
  g, x = {'none': lambda v: v, 'tanh': np.tanh, 'relu': relu}[activation], x0
  for i in range(layers):
    low = g(linear(p[f'v_{i}'], x))
    if activation != 'none':
      low = g(linear(p[f'c_{i}'], low))
    x = x0 * linear(p[f'u_{i}'], low) + x
  return x


def mixture(p, x0, layers, experts, rank, activation, gate):
  g, x = {'none': lambda v: v, 'tanh': np.tanh, 'relu': relu}[activation], x0
  for i in range(layers):
    gates = (softmax if gate == 'softmax' else sigmoid)(linear(p[f'gate_{i}'], x))
    total = x
    for e in range(experts):
      part = slice(e * rank, (e + 1) * rank)
      low = g(x @ p[f'v_{i}']['kernel'][:, part])
      if activation != 'none':
        low = g(low @ p[f'c_{i}'][e])
      total = total + gates[e] * x0 * (low @ p[f'u_{i}']['kernel'][part] + p[f'bias_{i}'])
    x = total
  return x


def gdcn(p, x0, layers):
  x = x0
  for i in range(layers):
    x = x0 * linear(p[f'cross_{i}'], x) * sigmoid(linear(p[f'gate_{i}'], x)) + x
  return x


def mask_block(p, h, v):
  mask = linear(p['mask_out'], relu(linear(p['mask_in'], v)))
  return relu(layer_norm(p['norm'], linear(p['hidden'], mask * h)))


def masknet(p, fields, x0, blocks, serial):
  h, made = field_norm(p['norm'], fields, x0), []
  for i in range(blocks):
    made.append(mask_block(p[f'block_{i}'], made[-1] if serial and made else h, x0))
  return made[-1] if serial else np.concatenate(made)


def final(p, fields, x0, blocks, layers):
  return dcnv2(p['cross'], masknet(p['mask'], fields, x0, blocks, serial=False), layers)


def mlp(p, x):
  for i in range(len(p)):
    x = relu(linear(p[f'layer_{i}'], x))
  return x


def finalmlp(p, fields, x0, heads, gates):
  streams = []
  for i, names in enumerate(gates):
    logits = p.get(f'gate_{i}')
    if names:
      seen = np.concatenate([part for f, part in zip(fields, of_fields(fields, x0), strict=True) if f.name in names])
      logits = linear(p[f'gate_{i}_out'], relu(linear(p[f'gate_{i}_in'], seen)))
    streams.append(mlp(p[f'stream_{i}'], 2 * sigmoid(logits) * x0))
  out = linear(p['first'], streams[0]) + linear(p['second'], streams[1])
  first, second = (np.split(stream, heads) for stream in streams)
  for h in range(heads):
    for o in range(len(out)):
      out[o] += first[h] @ p['bilinear'][h, :, :, o] @ second[h]
  return out


def fm(p, fields, x0):
  e = tokens(p['tokens'], fields, x0)
  return sum(e[i] * e[j] for i in range(len(e)) for j in range(i + 1, len(e)))


def cin(p, fields, x0, layers, maps):
  first = tokens(p['tokens'], fields, x0)
  x, pooled = first, []
  for k in range(layers):
    weights = p[f'layer_{k}']['kernel']
    made = np.zeros((maps, first.shape[1]))
    for h in range(maps):
      for i in range(len(x)):
        for j in range(len(first)):
          made[h] += weights[i * len(first) + j, h] * x[i] * first[j]
    x = made
    pooled.append(x.sum(axis=1))
  return np.concatenate(pooled)


def attention(p, x, heads, scale):
  width = p['query_key_value']['kernel'].shape[1] // 3
  query, key, value = np.split(x @ p['query_key_value']['kernel'], 3, axis=1)
  made = np.zeros((len(x), width))
  for h in range(heads):
    part = slice(h * width // heads, (h + 1) * width // heads)
    for m in range(len(x)):
      weights = softmax(np.array([query[m, part] @ key[k, part] for k in range(len(x))]) * scale)
      made[m, part] = weights @ value[:, part]
  return made


def autoint(p, fields, x0, layers, heads):
  x = tokens(p['tokens'], fields, x0)
  for i in range(layers):
    x = relu(attention(p[f'attention_{i}'], x, heads, 1.0) + x @ p[f'residual_{i}']['kernel'])
  return x.ravel()


def transformer(p, fields, x0, layers, heads):
  x = tokens(p['tokens'], fields, x0)
  norm = lambda name, rows: np.array([layer_norm(p[name], row) for row in rows])
  for i in range(layers):
    scale = (x.shape[1] // heads) ** -0.5
    attended = attention(p[f'attention_{i}'], norm(f'norm_attention_{i}', x), heads, scale)
    x = x + linear(p[f'attention_out_{i}'], attended)
    x = x + linear(p[f'mlp_out_{i}'], gelu(linear(p[f'mlp_in_{i}'], norm(f'norm_mlp_{i}', x))))
  return norm('norm', x).ravel()


def dhen(p, x0, layers, width, blocks):
  """`blocks`: kind -> (parameters, layer, input) -> output."""
  x = x0
  for i in range(layers):
    total = x if len(x) == width else linear(p[f'shortcut_{i}'], x)
    for kind, block in blocks.items():
      total = total + linear(p[f'{kind}_{i}_out'], block(p.get(f'{kind}_{i}', {}), i, x))
    x = layer_norm(p[f'norm_{i}'], total)
  return x


def field_inputs(p, fields, x0, most_width):
  """The projected parts side by side, each field's norm, each field's gate; `fields` before and after."""
  before, after = fields
  parts = [linear(p[f'narrow_{f.name}'], part) if f.width > most_width else part
           for f, part in zip(before, of_fields(before, x0), strict=True)]  # fmt: skip
  x = field_norm(p['norm'], after, np.concatenate(parts))
  gates = 2 * sigmoid(linear(p['gates'], x))
  return np.concatenate([gate * part for gate, part in zip(gates, of_fields(after, x), strict=True)])
