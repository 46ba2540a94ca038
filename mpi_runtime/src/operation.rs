//! What an operation is: one plain struct that travels from the FFI boundary to the MPI call and
//! that order, checks, the pending table and logging read.

use std::ffi::c_void;
use std::fmt;

use mpi_shim_abi::{ANY, Datatype, Kind, PROC_NULL, Reduction};

use crate::error::Failure;

/// An operation on one communicator, as the program asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    /// What to do.
    pub kind: Kind,
    /// Whose it is, if it is no operation of the user's own: `mpi4jax's`.
    pub of: Option<&'static str>,
    /// Number of the communicator (see [`crate::mpi::communicators`]).
    pub comm: i64,
    /// What this rank passes.
    pub send: Buffer<'a>,
    /// Where this rank's result goes.
    pub recv: Buffer<'a>,
    /// Reduction, of the reducing kinds.
    pub reduction: Option<Reduction>,
    /// Handle of the user's own reduction, for [`Reduction::User`].
    pub user_reduction: u64,
    /// Root, of the kinds that have one.
    pub root: i32,
    /// Destination of a send; may be [`PROC_NULL`].
    pub dest: i32,
    /// Source of a receive; may be [`ANY`] or [`PROC_NULL`].
    pub source: i32,
    /// Tag of what is sent.
    pub send_tag: i32,
    /// Tag of what is received; may be [`ANY`].
    pub recv_tag: i32,
    /// Address of an `MPI_Status` to fill, or 0.
    pub status: usize,
}

impl<'a> Operation<'a> {
    /// An operation of the user's on `comm`: with root 0 or destination 0, from any source and with any
    /// tag, itself tagged 0.
    pub const fn new(kind: Kind, comm: i64, send: Buffer<'a>, recv: Buffer<'a>) -> Operation<'a> {
        Operation {
            kind,
            of: None,
            comm,
            send,
            recv,
            reduction: None,
            user_reduction: 0,
            root: 0,
            dest: 0,
            source: ANY,
            send_tag: 0,
            recv_tag: ANY,
            status: 0,
        }
    }

    /// How many bytes at the end of the result of this receive a message of `bytes` leaves unwritten.
    ///
    /// # Errors
    /// If it does not fit, or is shorter than it may be.
    pub fn missing(&self, source: i32, tag: i32, bytes: usize) -> Result<usize, Failure> {
        let expected = self.recv.bytes();
        let may_be_shorter = self.source == PROC_NULL || self.status != 0;
        if bytes > expected || bytes < expected && !may_be_shorter {
            return Err(wrong_length(source, tag, bytes, expected));
        }
        Ok(expected - bytes)
    }

    /// What it is, without its arrays.
    pub fn without_arrays(&self) -> Operation<'static> {
        let Operation {
            kind,
            of,
            comm,
            reduction,
            user_reduction,
            root,
            dest,
            source,
            send_tag,
            recv_tag,
            status,
            ..
        } = *self;
        let none = |like: &Buffer<'_>| Buffer {
            dtype: like.dtype,
            ..Buffer::NONE
        };
        Operation {
            kind,
            of,
            comm,
            send: none(&self.send),
            recv: none(&self.recv),
            reduction,
            user_reduction,
            root,
            dest,
            source,
            send_tag,
            recv_tag,
            status,
        }
    }
}

/// What is wrong with a message of `bytes` for a result of `expected` bytes.
pub(crate) fn wrong_length(source: i32, tag: i32, bytes: usize, expected: usize) -> Failure {
    let remedy = if bytes < expected {
        " (pass status= to accept less)"
    } else {
        ""
    };
    format!(
        "the message from rank {source} with tag {tag} has {bytes} bytes, and the result {expected}; \
         both sides must have the same shape and dtype{remedy}"
    )
    .into()
}

/// A dense row-major array in memory.
#[derive(Clone, Copy, Debug)]
pub struct Buffer<'a> {
    /// First element; may be null when the array is empty or absent.
    pub data: *mut c_void,
    /// Element type.
    pub dtype: ElementType,
    /// Dimensions, outermost first.
    pub shape: &'a [i64],
}

// SAFETY: the address is only a number here; whoever reads or writes through it promises that
// the memory is there, on whichever thread that happens.
unsafe impl Send for Buffer<'_> {}

impl Buffer<'_> {
    /// No array: what `barrier` sends and `send` receives.
    pub const NONE: Buffer<'static> = Buffer {
        data: std::ptr::null_mut(),
        dtype: ElementType::U8,
        shape: &[0],
    };

    /// Number of elements.
    pub fn elements(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Size in bytes, for dtypes that MPI moves as whole bytes.
    pub fn bytes(&self) -> usize {
        self.elements() as usize * self.dtype.size()
    }
}

/// Reductions and their names, in the order of the numbers used by the custom calls.
pub const REDUCTIONS: [(Reduction, &str); 10] = [
    (Reduction::Sum, "SUM"),
    (Reduction::Prod, "PROD"),
    (Reduction::Min, "MIN"),
    (Reduction::Max, "MAX"),
    (Reduction::Land, "LAND"),
    (Reduction::Lor, "LOR"),
    (Reduction::Lxor, "LXOR"),
    (Reduction::Band, "BAND"),
    (Reduction::Bor, "BOR"),
    (Reduction::Bxor, "BXOR"),
];

/// Name of a reduction.
pub fn reduction_name(reduction: Reduction) -> &'static str {
    REDUCTIONS
        .get(reduction as usize)
        .map_or("user-defined reduction", |row| row.1)
}

/// What kind of number an element is; decides which reductions it has (MPI 4.0, table 6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `bool`: every reduction, as in numpy.
    Logical,
    /// Signed and unsigned integers: every reduction.
    Integer,
    /// Real numbers: SUM, PROD, MIN, MAX.
    Real,
    /// Complex numbers: SUM and PROD.
    Complex,
    /// Moved only: no reductions.
    Opaque,
}

macro_rules! element_types {
    ($($variant:ident = $name:literal, $size:literal, $class:ident, $mpi:expr;)+) => {
        /// Element types of arrays; declared once, with what everything else derives from.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum ElementType { $($variant,)+ }

        impl ElementType {
            /// numpy's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
            /// Bytes per element.
            pub const fn size(self) -> usize {
                match self { $(Self::$variant => $size,)+ }
            }
            /// Which reductions it has.
            pub const fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)+ }
            }
            /// The MPI datatype, where there is one.
            pub const fn datatype(self) -> Option<Datatype> {
                match self { $(Self::$variant => $mpi,)+ }
            }
        }
    };
}

element_types! {
    Bool = "bool", 1, Logical, Some(Datatype::Bool);
    I8 = "int8", 1, Integer, Some(Datatype::I8);
    I16 = "int16", 2, Integer, Some(Datatype::I16);
    I32 = "int32", 4, Integer, Some(Datatype::I32);
    I64 = "int64", 8, Integer, Some(Datatype::I64);
    U8 = "uint8", 1, Integer, Some(Datatype::U8);
    U16 = "uint16", 2, Integer, Some(Datatype::U16);
    U32 = "uint32", 4, Integer, Some(Datatype::U32);
    U64 = "uint64", 8, Integer, Some(Datatype::U64);
    F32 = "float32", 4, Real, Some(Datatype::F32);
    F64 = "float64", 8, Real, Some(Datatype::F64);
    C64 = "complex64", 8, Complex, Some(Datatype::C64);
    C128 = "complex128", 16, Complex, Some(Datatype::C128);
    F16 = "float16", 2, Real, Some(Datatype::F16);
    BF16 = "bfloat16", 2, Real, Some(Datatype::BF16);
    F8 = "an 8-bit float type", 1, Opaque, Some(Datatype::U8);
    Other = "a type of less than 8 bits", 1, Opaque, None;
}

impl fmt::Display for Operation<'_> {
    /// `send of float32[3,4] to rank 1 with tag 7`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(of) = self.of {
            write!(f, "{of} ")?;
        }
        write!(f, "{}", self.kind.name())?;
        match self.kind {
            Kind::Barrier => return Ok(()),
            kind if kind.is_end() => return Ok(()),
            Kind::Irecv => write!(f, " of {}", self.send.dtype.name())?,
            Kind::Recv => write!(f, " into {}", Shaped(&self.recv))?,
            Kind::Sendrecv => {
                write!(f, " of {} into {}", Shaped(&self.send), Shaped(&self.recv))?;
            }
            _ => write!(f, " of {}", Shaped(&self.send))?,
        }
        if let Some(reduction) = self.reduction {
            write!(f, " with {}", reduction_name(reduction))?;
        }
        if self.kind.sends() {
            write!(f, " to rank {} with tag {}", Rank(self.dest), self.send_tag)?;
        }
        if self.kind.sends() && self.kind.receives() {
            f.write_str(" and")?;
        }
        if self.kind.receives() {
            let (source, tag) = (Rank(self.source), Tag(self.recv_tag));
            write!(f, " from rank {source} with tag {tag}")?;
        }
        if self.kind.has_root() {
            write!(f, " with root {}", self.root)?;
        }
        Ok(())
    }
}

struct Shaped<'a>(&'a Buffer<'a>);
struct Rank(i32);
struct Tag(i32);

impl fmt::Display for Shaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.0.shape.iter().map(i64::to_string).collect();
        write!(f, "{}[{}]", self.0.dtype.name(), shape.join(","))
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ANY => f.write_str("ANY_SOURCE"),
            PROC_NULL => f.write_str("PROC_NULL"),
            rank => write!(f, "{rank}"),
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == ANY {
            f.write_str("ANY_TAG")
        } else {
            write!(f, "{}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_describes_itself() {
        let shape = [3, 4];
        let x = Buffer {
            data: std::ptr::null_mut(),
            dtype: ElementType::F32,
            shape: &shape,
        };
        let send = Operation {
            dest: 1,
            send_tag: 7,
            ..Operation::new(Kind::Send, 0, x, Buffer::NONE)
        };
        assert_eq!(
            send.to_string(),
            "send of float32[3,4] to rank 1 with tag 7"
        );
        let recv = Operation {
            kind: Kind::Recv,
            recv: x,
            ..send
        };
        assert_eq!(
            recv.to_string(),
            "recv into float32[3,4] from rank ANY_SOURCE with tag ANY_TAG"
        );
        let foreign = Operation {
            of: Some("mpi4jax's"),
            ..recv
        };
        assert!(foreign.to_string().starts_with("mpi4jax's recv into"));
    }

    #[test]
    fn reductions_are_in_the_order_of_the_contract() {
        for (number, (reduction, _)) in REDUCTIONS.iter().enumerate() {
            assert_eq!(*reduction as usize, number);
        }
    }
}
