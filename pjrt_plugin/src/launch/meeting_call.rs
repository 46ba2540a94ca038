//! What a part of a launch on several devices brings to a meeting: a collective and its arrays,
//! which whoever executes it for all parts reads and writes.

use mpi_runtime::LentArray;

use crate::error::Error;

/// One collective of one part.
pub struct Call {
    /// What it is.
    pub target: &'static str,
    /// Its attributes: all of them are the same in every part.
    pub numbers: [i64; 4],
    /// How many blocks lie apart in each array.
    pub outer: Vec<usize>,
    /// Its operands. The part waits until the call has been dropped.
    pub args: Vec<LentArray>,
    /// Its results, likewise.
    pub rets: Vec<LentArray>,
}

impl Call {
    /// Whether both are the same, of arrays that are alike.
    pub fn is_like(&self, other: &Call) -> bool {
        let alike = |one: &[LentArray], other: &[LentArray]| {
            let mut pairs = one.iter().zip(other);
            one.len() == other.len()
                && pairs.all(|(a, b)| {
                    let (a, b) = (a.buffer(), b.buffer());
                    a.dtype() == b.dtype() && a.shape() == b.shape()
                })
        };
        (self.target, self.numbers, &self.outer) == (other.target, other.numbers, &other.outer)
            && alike(&self.args, &other.args)
            && alike(&self.rets, &other.rets)
    }

    /// It and its operands, for people.
    pub fn words(&self) -> String {
        let arrays = self.args.iter().map(|array| array.buffer().to_string());
        let arrays: Vec<String> = arrays.collect();
        let name = self.target.strip_prefix(hlo_rewrite::TARGET_PREFIX);
        format!("{} of {}", name.unwrap_or(self.target), arrays.join(", "))
    }

    /// An operand.
    ///
    /// # Errors
    /// If it has none there.
    pub fn operand(&self, index: usize) -> Result<&LentArray, Error> {
        let array = self.args.get(index);
        array.ok_or_else(|| Error::internal("a collective lacks an operand"))
    }

    /// A result.
    ///
    /// # Errors
    /// If it has none there.
    pub fn result(&self, index: usize) -> Result<&LentArray, Error> {
        let array = self.rets.get(index);
        array.ok_or_else(|| Error::internal("a collective lacks a result"))
    }
}
