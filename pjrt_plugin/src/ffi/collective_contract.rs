//! The check of a collective's call: how its operands and results belong together, and the
//! attributes `outer0`, `outer1` and so on of arrays whose parts lie apart.

#![forbid(unsafe_code)]

use pjrt_sys::{XLA_FFI_Buffer, XLA_FFI_DataType_U32};

use super::attributes::Value;
use super::contract::{Contract, Values, words};
use super::frame::Frame;
use crate::error::Error;

/// A target of a program for several devices, with any number of arrays.
pub struct CollectiveContract {
    pub call: Contract,
    pub rule: Rule,
}

/// What holds between operands and results; the same as where programs are rewritten
/// (`hlo_rewrite`, `shape_rule.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Each result is as its operand.
    Same,
    /// Each result has its operand for each member of the group.
    Gathered,
    /// Each operand has its result for each member of the group.
    Scattered,
    /// Operands are blocks, one for each member, or one array of them; results likewise.
    Blocks,
    /// Operand and result have a block for each member.
    Divided,
    /// Operands of one type; the result is the number of what was started.
    Started,
    /// The operand is the number of what was started; its results have one type.
    Ended,
}

/// How many blocks of each rank's part lie apart in the whole, of each array; empty if all are 1.
pub type Outer = Vec<usize>;

impl CollectiveContract {
    /// Checks the attributes.
    pub fn attributes<'a>(&self, frame: &Frame<'a>) -> Result<(Values<'a>, Outer), Error> {
        let mut outer = Outer::new();
        let mut values = Values::default();
        let arrays = frame.args.len().saturating_sub(1);
        self.call.values(frame, &mut values, |name, value| {
            self.read_outer(name, value, arrays, &mut outer)
        })?;
        match outer.iter().position(|&blocks| blocks == 0) {
            Some(index) => Err(self.call.bad(format!(
                "attribute outer{index} is missing, and others are there"
            ))),
            None => Ok((values, outer)),
        }
    }

    fn read_outer(
        &self,
        name: &[u8],
        value: Value<'_>,
        arrays: usize,
        outer: &mut Outer,
    ) -> Result<bool, Error> {
        let number = name.strip_prefix(b"outer").and_then(|digits| {
            let index: usize = std::str::from_utf8(digits).ok()?.parse().ok()?;
            (digits == index.to_string().as_bytes()).then_some(index)
        });
        let has_parts = matches!(self.rule, Rule::Gathered | Rule::Scattered | Rule::Divided);
        let Some(index) = number.filter(|&index| has_parts && index < arrays) else {
            return Ok(false);
        };
        outer.resize(arrays, 0);
        let blocks = value
            .int64()
            .and_then(|blocks| usize::try_from(blocks).ok());
        outer[index] = blocks.filter(|&blocks| blocks > 0).ok_or_else(|| {
            let reason = format!("attribute outer{index} is {value}, and must be an int64 above 0");
            self.call.bad(reason)
        })?;
        Ok(true)
    }

    /// Checks operands and results, of a group of `size` ranks if this rank is in one. The last of
    /// each are tokens.
    pub fn arrays(
        &self,
        frame: &Frame<'_>,
        outer: &[usize],
        size: Option<i64>,
    ) -> Result<(), Error> {
        let operands = self.split(frame.args, "operand")?;
        let results = self.split(frame.rets, "result")?;
        let size = size.unwrap_or(1);
        if self.rule == Rule::Blocks {
            return self.blocks(operands, results, size);
        }
        if self.rule == Rule::Started {
            return self.half(operands, "operand", results, "result");
        }
        if self.rule == Rule::Ended {
            return self.half(results, "result", operands, "operand");
        }
        if operands.len() != results.len() {
            let (operands, results) = (operands.len(), results.len());
            return Err(self
                .call
                .bad(format!("it has {operands} operands and {results} results")));
        }
        let (factor, divisor) = match self.rule {
            Rule::Gathered => (size, 1),
            Rule::Scattered => (1, size),
            _ => (1, 1),
        };
        for (index, (operand, result)) in operands.iter().zip(results).enumerate() {
            let send = self.call.array(operand, index, "operand")?;
            let recv = self.call.array(result, index, "result")?;
            if operand.dtype != result.dtype {
                return Err(self.call.unlike(operand, index, result, index));
            }
            let fits = send
                .checked_mul(factor)
                .is_some_and(|product| Some(product) == recv.checked_mul(divisor));
            // The whole divides into the blocks of all ranks' parts.
            let whole = send.max(recv);
            let parts = outer
                .get(index)
                .copied()
                .unwrap_or(1)
                .checked_mul(size as usize);
            let divides = (self.rule != Rule::Divided && outer.is_empty())
                || whole == 0
                || parts.is_some_and(|parts| (whole as usize).is_multiple_of(parts));
            if !fits || !divides {
                return Err(self.unfit(index, operand, result, size, outer));
            }
        }
        Ok(())
    }

    /// Arrays of one type on one side, and one number on the other.
    fn half(
        &self,
        arrays: &[&XLA_FFI_Buffer],
        what: &str,
        numbers: &[&XLA_FFI_Buffer],
        other: &str,
    ) -> Result<(), Error> {
        let [number] = numbers else {
            let count = numbers.len();
            return Err(self
                .call
                .bad(format!("it has {count} {other}s, and must have one")));
        };
        if number.dtype != XLA_FFI_DataType_U32 || self.call.array(number, 0, other)? != 1 {
            let number = words(number);
            return Err(self
                .call
                .bad(format!("{other} 0 is {number}, and must be a uint32[]")));
        }
        let Some(first) = arrays.first() else {
            return Err(self.call.bad(format!("it has no {what} beside the token")));
        };
        for (index, array) in arrays.iter().enumerate() {
            self.call.array(array, index, what)?;
            if array.dtype != first.dtype {
                return Err(self.call.bad(format!(
                    "{what} {index} is {}, and {what} 0 {}; all must have one type",
                    words(array),
                    words(first)
                )));
            }
        }
        Ok(())
    }

    /// Blocks of the same size and type, or one array with all of them.
    fn blocks(
        &self,
        operands: &[&XLA_FFI_Buffer],
        results: &[&XLA_FFI_Buffer],
        size: i64,
    ) -> Result<(), Error> {
        let count = size as usize;
        for (given, what) in [(operands, "operands"), (results, "results")] {
            if given.len() != count && given.len() != 1 {
                let given = given.len();
                return Err(self.call.bad(format!(
                    "it has {given} {what}, and must have one, or one for each of {size} ranks"
                )));
            }
        }
        let first = operands[0];
        let mut block = None;
        for (given, what) in [(operands, "operand"), (results, "result")] {
            for (index, buffer) in given.iter().enumerate() {
                let elements = self.call.array(buffer, index, what)?;
                let parts = if given.len() == count { 1 } else { size };
                if buffer.dtype != first.dtype
                    || elements % parts != 0
                    || *block.get_or_insert(elements / parts) != elements / parts
                {
                    return Err(self.call.bad(format!(
                        "{what} {index} is {}, which does not fit operand 0, {}, on {size} ranks",
                        words(buffer),
                        words(first)
                    )));
                }
            }
        }
        Ok(())
    }

    /// Takes off the token, which is the last.
    fn split<'a, 'b>(
        &self,
        given: &'b [&'a XLA_FFI_Buffer],
        what: &str,
    ) -> Result<&'b [&'a XLA_FFI_Buffer], Error> {
        match given.split_at_checked(given.len().wrapping_sub(1)) {
            Some((arrays, token)) => {
                self.call.tokens(token, arrays.len(), what)?;
                Ok(arrays)
            }
            None => Err(self
                .call
                .bad(format!("it has no {what}; the last must be a token"))),
        }
    }

    #[cold]
    fn unfit(
        &self,
        index: usize,
        operand: &XLA_FFI_Buffer,
        result: &XLA_FFI_Buffer,
        size: i64,
        outer: &[usize],
    ) -> Error {
        let apart = outer.get(index).map_or(String::new(), |blocks| {
            format!(", with outer{index} = {blocks}")
        });
        self.call.bad(format!(
            "operand {index} is {}, and result {index} is {}, which do not fit on {size} \
             ranks{apart}",
            words(operand),
            words(result)
        ))
    }
}
