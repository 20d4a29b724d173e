//! Products with a weight matrix, dense or packed.

use super::product::products;
use crate::error::Result;
use candle_core::Tensor;
use candle_core::quantized::QTensor;
use std::sync::Arc;

/// A weight matrix, `[outputs, inputs]`, as it is computed with.
#[derive(Clone)]
pub(crate) enum Matrix {
    /// f32, turned to `[inputs, outputs]`: the files have it the other way round, which the product of a few tokens would
    /// turn each time.
    Dense(Tensor),
    /// In blocks of a few bits or in numbers of 16, which products decode on the way.
    Packed(Arc<QTensor>),
}

/// A matrix and its bias.
pub(crate) struct Linear {
    pub matrix: Matrix,
    pub bias: Option<Tensor>,
}

impl Matrix {
    /// `x`, `[tokens, inputs]`, times the matrix, `[tokens, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(matrix) => x.matmul(matrix)?,
            Self::Packed(matrix) => products(x, &[matrix])?.remove(0),
        })
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.elem_count() * size_of::<f32>(),
            Self::Packed(matrix) => matrix.storage_size_in_bytes(),
        }
    }

    /// The rows of these numbers, `[numbers, inputs]`.
    pub fn rows(&self, numbers: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(matrix) => matrix.t()?.embedding(numbers)?,
            Self::Packed(matrix) => matrix.embedding(numbers)?,
        })
    }
}

impl Linear {
    /// [`Linear::forward`] of several with the same `x`, together.
    pub fn forward_all<const N: usize>(linears: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let packed = linears.iter().map(|linear| match &linear.matrix {
            Matrix::Packed(matrix) => Some(&**matrix),
            Matrix::Dense(_) => None,
        });
        let outputs: Vec<Tensor> = match packed.collect::<Option<Vec<_>>>() {
            Some(packed) => {
                let products = products(x, &packed)?.into_iter().zip(linears);
                products.map(|(y, linear)| linear.add_bias(y)).collect::<Result<_>>()?
            }
            None => linears.iter().map(|linear| linear.forward(x)).collect::<Result<_>>()?,
        };
        // There are as many as were asked for.
        outputs.try_into().map_err(|_| candle_core::Error::Msg("products are missing".into()).into())
    }

    fn add_bias(&self, y: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// `[tokens, inputs]` to `[tokens, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.add_bias(self.matrix.forward(x)?)
    }
}
