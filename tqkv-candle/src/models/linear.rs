//! Products with a weight matrix, dense or packed.

use super::product::product;
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
            Self::Packed(matrix) => product(x, matrix)?,
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
    /// `[tokens, inputs]` to `[tokens, outputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.matrix.forward(x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}
