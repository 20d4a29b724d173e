//! Attention straight over the compressed bytes.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::problem::checks::{expect_apart, expect_f32, expect_float, expect_shape};
use crate::problem::op::{self, Near, Op};
use crate::problem::{AttentionParams, Batch, Domain, PagePool, Visible};

/// Softmax(scale · q·Kᵀ)·V for the new positions of every sequence, without writing K or V out.
///
/// `q` and `out` are \[tokens, heads, head_dim\] (f32, f16 or bf16 each; tokens in the batch's order), `heads` a multiple
/// of the pools' kv_heads: query heads h·g..(h+1)·g read KV head h, and each row is decoded once for its whole group. The
/// query of a sequence's i-th new token stands at position len - new + i. `key` and `value` may have different codecs.
/// `lse`, f32 \[tokens, heads\], gets the natural logarithm of the softmax denominator, sinks included, so that partial
/// results can be [`merge`](super::merge)d. A query that sees no position gets zeros and -∞ (the sink's logit if any).
///
/// Keys whose pool has a [`ChannelMap`](super::ChannelMap) give what they would without: scores, `lse` and softcap are those of the
/// keys as they came. Queries and output must be in the model's own domain then, and values have no map.
///
/// One pass over K and V with a running maximum: Dao et al., FlashAttention (arXiv:2205.14135, section 3.1), split over
/// the context as in Flash-Decoding.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Mismatch`] (heads, pools or pages that do not go
/// together), [`Error::Page`], [`Error::Parameter`] for a scale that is not finite or a softcap that is not positive,
/// [`Error::Zero`] for a window of 0, [`Error::Channels`], [`Error::Aliased`].
///
/// ```
/// use tqkv::format::RowFormat;
/// use tqkv::ops::{AttentionParams, Batch, PagePool, Span, attention, quantize};
/// use tqkv::{Codec, DType, Device};
///
/// let device = Device::cpu();
/// // Keys in 5 bits, values in 4; 2 KV heads of head_dim 64, pages of 16 positions.
/// let keys = PagePool::new(&device, RowFormat::new(Codec::tq(5), 64)?, 2, 16, 1)?;
/// let values = PagePool::new(&device, RowFormat::new(Codec::tq(4), 64)?, 2, 16, 1)?;
/// // A sequence of 3 positions, all new, in page 0.
/// let batch = Batch::new(&device, 16, &[Span { first: 0, len: 3, new: 3, pages: &[0] }])?;
/// let k = device.upload(&[0.5f32; 3 * 2 * 64], &[3, 2, 64])?;
/// let v = device.upload(&[2f32; 3 * 2 * 64], &[3, 2, 64])?;
/// let q = device.upload(&[1f32; 3 * 8 * 64], &[3, 8, 64])?; // 4 query heads a KV head
/// let out = device.zeros(DType::F32, &[3, 8, 64])?;
/// let mut encoder = device.encoder()?;
/// quantize(&mut encoder, &[(&k, &keys), (&v, &values)], &batch)?;
/// attention(&mut encoder, &q, &keys, &values, &batch, &AttentionParams::for_head_dim(64), &out, None)?;
/// encoder.submit_and_wait()?;
/// // All values are one vector, so their mean is too, to the precision of 4 bits.
/// let out = out.read::<f32>()?;
/// let error: f32 = out.iter().map(|x| (x - 2.0).powi(2)).sum();
/// assert!((error / out.len() as f32).sqrt() < 0.2 * 2.0);
/// # Ok::<(), tqkv::Error>(())
/// ```
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn attention(
    encoder: &mut CommandEncoder,
    q: &Buffer,
    key: &PagePool,
    value: &PagePool,
    batch: &Batch,
    params: &AttentionParams,
    out: &Buffer,
    lse: Option<&Buffer>,
) -> Result<()> {
    let op = checked(encoder, q, &Part { key, value, batch, params }, out, lse)?;
    if batch.tokens() == 0 { Ok(()) } else { Op::Attention(op).record(encoder) }
}

/// Positions of one pair of pools, and how they are attended to.
pub(crate) struct Part<'a> {
    pub key: &'a PagePool,
    pub value: &'a PagePool,
    pub batch: &'a Batch,
    pub params: &'a AttentionParams,
}

/// [`attention`] over several parts whose results belong together, as one operation; the parameters are the first part's but for what of the
/// others is seen. False, and nothing is recorded, where the device does not do that.
pub(crate) fn attention_of_parts(
    encoder: &mut CommandEncoder,
    q: &Buffer,
    parts: &[Part],
    out: &Buffer,
    lse: Option<&Buffer>,
) -> Result<bool> {
    let [own, others @ ..] = parts else { return Ok(false) };
    let mut op = checked(encoder, q, own, out, lse)?;
    for part in others {
        checked(encoder, q, part, out, lse)?;
        let visible = Visible { causal: part.params.causal, window: part.params.window };
        let (key, value, batch) = (part.key.clone(), part.value.clone(), part.batch.clone());
        op.near.push(Near { key, value, batch, visible });
    }
    if own.batch.tokens() == 0 || !encoder.fuses(&op) {
        return Ok(false);
    }
    Op::Attention(op).record(encoder).map(|()| true)
}

/// The operation, if nothing is wrong with it.
fn checked(
    encoder: &CommandEncoder,
    q: &Buffer,
    &Part { key, value, batch, params }: &Part,
    out: &Buffer,
    lse: Option<&Buffer>,
) -> Result<op::Attention> {
    for (what, buffer) in [("q", q), ("key", key.codes()), ("value", value.codes()), ("out", out)] {
        encoder.expect_own(what, buffer)?;
    }
    encoder.expect_device("batch", batch.device())?;
    let head_dim = key.row().head_dim();
    if value.row().head_dim() != head_dim {
        let expected = format!("{head_dim} as in the keys");
        return Err(Error::Mismatch { what: "head_dim of the values", got: value.row().head_dim(), expected });
    }
    if value.channels().is_some() {
        return Err(Error::Channels { what: "values", operation: "attention" });
    }
    if key.channels().is_some() && params.domain == Domain::Rotated {
        return Err(Error::Channels { what: "keys", operation: "queries in the rotated domain" });
    }
    if value.kv_heads() != key.kv_heads() {
        let expected = format!("{} as in the keys", key.kv_heads());
        return Err(Error::Mismatch { what: "kv_heads of the values", got: value.kv_heads(), expected });
    }
    batch.expect_within(key)?;
    batch.expect_within(value)?;
    let head_dim = params.domain.dim(key.row());
    expect_float("q", q)?;
    expect_float("out", out)?;
    let &[_, heads, _] = q.shape() else {
        return Err(Error::shape("q", q.shape(), format!("[{}, heads, {head_dim}]", batch.tokens())));
    };
    expect_shape("q", q, &[batch.tokens(), heads, head_dim])?;
    expect_shape("out", out, &[batch.tokens(), heads, head_dim])?;
    if heads == 0 {
        return Err(Error::Zero { what: "heads" });
    }
    if !heads.is_multiple_of(key.kv_heads()) {
        let expected = format!("a multiple of kv_heads {}", key.kv_heads());
        return Err(Error::Mismatch { what: "heads", got: heads, expected });
    }
    if !params.scale.is_finite() {
        return Err(Error::Parameter { name: "scale", got: params.scale, expected: "finite" });
    }
    if let Some(cap) = params.softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
        return Err(Error::Parameter { name: "softcap", got: cap, expected: "finite and positive" });
    }
    if params.window == Some(0) {
        return Err(Error::Zero { what: "window" });
    }
    if let Some(logits) = &params.sink_logits {
        encoder.expect_own("sink_logits", logits)?;
        expect_f32("sink_logits", logits)?;
        expect_shape("sink_logits", logits, &[heads])?;
    }
    let inputs = || std::iter::once(q).chain(key.buffers()).chain(value.buffers()).chain(&params.sink_logits);
    expect_apart("out", out, inputs())?;
    if let Some(lse) = lse {
        encoder.expect_own("lse", lse)?;
        expect_f32("lse", lse)?;
        expect_shape("lse", lse, &[batch.tokens(), heads])?;
        expect_apart("lse", lse, inputs().chain([out]))?;
    }
    Ok(op::Attention {
        q: q.clone(),
        heads,
        key: key.clone(),
        value: value.clone(),
        batch: batch.clone(),
        params: params.clone(),
        out: out.clone(),
        lse: lse.cloned(),
        near: vec![],
    })
}
