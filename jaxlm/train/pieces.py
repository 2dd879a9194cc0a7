# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens lie on several devices: how they are cut, and the attention across the cuts.

B rows, T tokens of a row, S devices along the mesh axis `sequence`, N query heads, K key heads, H head width.

A row is cut into 2 S chunks of c = T / 2S tokens, and device s holds chunks s and 2S - 1 - s: an early one, which sees
few keys, and a late one, which sees many, so that causal work is the same on all.  What a device holds is a piece.
Pieces lie as rows, [S * B, T / S, ...], so that whatever treats tokens one by one sees more, shorter rows.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.blocked_attention import SAVED
from jaxlm.kernels.decay import centred
from jaxlm.kernels.tiled_attention import tiled_attention
from jaxlm.train.mesh import ROWS, SEQUENCE, TILE, check_length, spec

PIECES = spec(("pieces",))


def make_pieces(mesh: Mesh) -> "Pieces | None":
    """What a model needs to divide tokens over this mesh; None where the mesh does not ask for it."""
    return Pieces(mesh) if mesh.shape[SEQUENCE] > 1 else None


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The cuts of one mesh; equal meshes make equal ones, so that equal models share their programs.

    Attributes:
      mesh: with more than one device along `sequence`.
    """

    mesh: Mesh

    @property
    def count(self) -> int:
        """S."""
        return self.mesh.shape[SEQUENCE]

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] to pieces [S * B, T / S, ...].

        Raises: ValueError, while tracing, for a length that cannot be cut.
        """
        check_length(self.mesh, x.shape[1])

        def deal(x: jax.Array) -> jax.Array:
            first, second = jnp.split(x, 2, axis=1)
            first, second = self._send(first, 0), self._send(second, 1)
            early = _like(jax.lax.axis_index(SEQUENCE) % 2 == 0, x)
            return jnp.concatenate([jnp.where(early, first, second), jnp.where(early, second, first)], axis=1)

        return jax.shard_map(deal, mesh=self.mesh, in_specs=P(ROWS, SEQUENCE), out_specs=PIECES, check_vma=False)(x)

    def join(self, x: jax.Array) -> jax.Array:
        """Pieces [S * B, T / S, ...] to [B, T, ...], tokens divided in their order."""

        def collect(x: jax.Array) -> jax.Array:
            low, high = jnp.split(x, 2, axis=1)
            early = _like(jax.lax.axis_index(SEQUENCE) % 2 == 0, x)
            first, second = jnp.where(early, low, high), jnp.where(early, high, low)
            return jnp.concatenate([self._send(first, 0, back=True), self._send(second, 1, back=True)], axis=1)

        return jax.shard_map(collect, mesh=self.mesh, in_specs=PIECES, out_specs=P(ROWS, SEQUENCE), check_vma=False)(x)

    def _send(self, x: jax.Array, half: int, *, back: bool = False) -> jax.Array:
        """Chunk 2 s + half of every device s to the device that works on it, or back."""
        S = self.count
        pairs = []
        for s in range(S):
            chunk = 2 * s + half
            there = chunk if chunk < S else 2 * S - 1 - chunk
            pairs.append((there, s) if back else (s, there))
        return jax.lax.ppermute(x, SEQUENCE, pairs)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        rates: jax.Array | None,
        fold: bool,
        window: int | jax.Array | None,
        scale: float,
        softcap: float | None,
        **arrays: jax.Array | None,
    ) -> jax.Array:
        """`tiled_attention` of the queries of each piece, over keys and values gathered from all of them.

        A device sends its keys and values to the S - 1 others and, backwards, gets their gradients summed.  Under remat
        they are kept as pieces and gathered again.

        Args:
          query: [S * B, T / S, N, H], pieces; keys and values, [S * B, T / S, K, H], too.
          rates: float32 [1 or K, H], or None.
          fold: whether rates go into queries and keys beforehand (`centred`) or decay from tile to tile.
          window: tokens seen.
          scale, softcap: of the scores.
          arrays: `segment_ids` and `clock` [B, T] or [1, T] of whole rows, `slopes` [N], `sink` [N]; or None.
        Returns: [S * B, T / S, N, H].
        Raises: ValueError where the mesh axis `tensor` does not divide the heads.
        """
        tensor, (N, K) = self.mesh.shape["tensor"], (query.shape[2], key.shape[2])
        if K % tensor:  # every device needs whole heads: as few copies of each as make them divide
            copies = tensor // math.gcd(K, tensor)
            if N % (K * copies):
                raise ValueError(
                    f"{N} query heads and {K} key heads cannot be divided over mesh.tensor={tensor} where "
                    f"mesh.sequence={self.count} divides tokens: choose a mesh.tensor that divides {N}"
                )
            key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
            rates = rates if rates is None or len(rates) == 1 else jnp.repeat(rates, copies, axis=0)
        given: dict[str, Any] = {"rates": rates, "window": window if isinstance(window, jax.Array) else None} | arrays
        given = {name: x for name, x in given.items() if x is not None}
        places = {"slopes": P("tensor"), "sink": P("tensor"), "window": P()}
        if rates is not None:
            places["rates"] = P() if len(rates) == 1 else P("tensor")
        places |= {
            name: P() if len(given[name]) == 1 else P(ROWS) for name in ("segment_ids", "clock") if name in given
        }
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        options |= {} if isinstance(window, jax.Array) else {"window": window}

        def local(query: jax.Array, key: jax.Array, value: jax.Array, given: dict[str, Any]) -> jax.Array:
            length = query.shape[1]
            tile = tile_of(length // 2)
            here = jax.lax.axis_index(SEQUENCE)
            chunks = jnp.stack([here, 2 * self.count - 1 - here]).astype(jnp.int32)
            each = length // 2 // tile
            at = (chunks[:, None] * each + jnp.arange(each, dtype=jnp.int32)[None]).reshape(-1)
            if fold:
                rates = given.pop("rates")
                clock = given.get("clock", jnp.arange(length * self.count, dtype=jnp.int32)[None])
                mine = clock.reshape(clock.shape[0], -1, tile)[:, at].reshape(clock.shape[0], -1)
                query, key = centred(query, key, rates, mine, ends=clock[:, :: clock.shape[1] - 1])
            key, value = (_gathered(checkpoint_name(x, SAVED)) for x in (key, value))
            return tiled_attention(query, key, value, at=at, tile=tile, **options, **given)

        heads = P(*PIECES, None, "tensor")
        divided = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, {name: places[name] for name in given}),
            out_specs=heads,
            check_vma=False,  # the kernel's loops start from zeros, which vary nowhere
        )
        return divided(query, key, value, given)


def tile_of(chunk: int) -> int:
    """Sides of the tiles that divide a chunk, tokens."""
    return chunk if chunk <= TILE else math.gcd(chunk, TILE)


def _gathered(x: jax.Array) -> jax.Array:
    """The keys or values of whole rows, in their order, from those of one's own piece [B, T / S, K, H]."""
    B, length, *rest = x.shape
    x = jax.lax.all_gather(x, SEQUENCE, axis=1).reshape(B, -1, 2, length // 2, *rest)
    early, late = x[:, :, 0], x[:, ::-1, 1]
    return jnp.concatenate([early, late], axis=1).reshape(B, -1, *rest)


def _like(flag: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(flag, (1,) * x.ndim)
