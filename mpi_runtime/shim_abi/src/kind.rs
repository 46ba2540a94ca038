//! The kinds of operations, and what they have in common: one table that everything else asks.

#![forbid(unsafe_code)]

/// How MPI executes a kind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Execution {
    /// All ranks of a communicator together (MPI 4.0, chapter 6).
    Collective,
    /// Between two ranks, and whole (MPI 4.0, chapter 3).
    Message,
    /// The start of a message ([`crate::ShimApi::start_send`] and the functions after it).
    Start,
    /// The end of one that was started.
    End,
}

/// The ranks on which an operation uses an array.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ranks {
    No,
    All,
    Root,
    Others,
}

impl Ranks {
    const fn have(self, is_root: bool) -> bool {
        match self {
            Ranks::No => false,
            Ranks::All => true,
            Ranks::Root => is_root,
            Ranks::Others => !is_root,
        }
    }
}

/// What there is to a kind besides its arrays.
#[derive(Clone, Copy)]
enum Trait {
    /// It combines the ranks' operands.
    Reduces = 1,
    /// It has a block for each rank, in its operand or its result.
    Blocks = 2,
    /// It sends a message to `dest`.
    Sends = 4,
    /// It receives a message from `source`.
    Receives = 8,
}

struct Row {
    name: &'static str,
    execution: Execution,
    operand: Ranks,
    result: Ranks,
    /// Sum of its traits.
    traits: u8,
}

macro_rules! kinds {
    ($(
        $(#[$attribute:meta])*
        $kind:ident = $name:literal,
            $execution:ident, $operand:ident, $result:ident, [$($trait:ident),*];
    )+) => {
        /// Kinds of operations; the same numbers on both sides of the contract.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Kind { $($(#[$attribute])* $kind,)+ }

        /// In the order of their numbers.
        const TABLE: &[Row] = &[$(Row {
            name: $name,
            execution: Execution::$execution,
            operand: Ranks::$operand,
            result: Ranks::$result,
            traits: 0 $(| Trait::$trait as u8)*,
        },)+];

        impl Kind {
            /// Every kind, in the order of their numbers.
            pub const ALL: &[Kind] = &[$(Kind::$kind,)+];
        }
    };
}

kinds! {
    // name, how MPI executes it, who passes an operand, who gets a result, and more
    Allgather = "allgather", Collective, All, All, [Blocks];
    Allreduce = "allreduce", Collective, All, All, [Reduces];
    Alltoall = "alltoall", Collective, All, All, [Blocks];
    Barrier = "barrier", Collective, No, No, [];
    Bcast = "bcast", Collective, Root, Others, [];
    Gather = "gather", Collective, All, Root, [Blocks];
    Recv = "recv", Message, No, All, [Receives];
    Reduce = "reduce", Collective, All, Root, [Reduces];
    Scan = "scan", Collective, All, All, [Reduces];
    Scatter = "scatter", Collective, Root, All, [Blocks];
    Send = "send", Message, All, No, [Sends];
    Sendrecv = "sendrecv", Message, All, All, [Sends, Receives];
    Exscan = "exscan", Collective, All, All, [Reduces];
    ReduceScatter = "reduce_scatter", Collective, All, All, [Reduces, Blocks];
    // The result of a start, and the operand of an end, is the message's number.
    Isend = "isend", Start, All, All, [Sends];
    Irecv = "irecv", Start, All, All, [Receives];
    Wait = "wait", End, All, All, [];
    WaitSend = "wait_send", End, All, No, [];
}

impl Kind {
    const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    const fn has(self, wanted: Trait) -> bool {
        self.row().traits & wanted as u8 != 0
    }

    /// Lower-case name, as users write it.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// All ranks of the communicator take part.
    pub const fn is_collective(self) -> bool {
        matches!(self.row().execution, Execution::Collective)
    }

    /// It is a message between two ranks, from its start to its end.
    pub const fn is_message(self) -> bool {
        matches!(self.row().execution, Execution::Message)
    }

    /// It starts a message, which another operation ends.
    pub const fn is_start(self) -> bool {
        matches!(self.row().execution, Execution::Start)
    }

    /// It waits for a message that was started.
    pub const fn is_end(self) -> bool {
        matches!(self.row().execution, Execution::End)
    }

    /// It sends a message, whose receiver is `dest`.
    pub const fn sends(self) -> bool {
        self.has(Trait::Sends)
    }

    /// It receives a message, whose sender is `source`.
    pub const fn receives(self) -> bool {
        self.has(Trait::Receives)
    }

    /// It waits for a message and receives it.
    pub const fn is_receive(self) -> bool {
        self.is_message() && self.receives()
    }

    /// It combines the operands of the ranks by a reduction.
    pub const fn reduces(self) -> bool {
        self.has(Trait::Reduces)
    }

    /// Its operand or its result has a block for each rank.
    pub const fn has_blocks(self) -> bool {
        self.has(Trait::Blocks)
    }

    /// One rank differs from the others.
    pub const fn has_root(self) -> bool {
        !matches!(self.row().operand, Ranks::No | Ranks::All)
            || !matches!(self.row().result, Ranks::No | Ranks::All)
    }

    /// Some rank passes an operand.
    pub const fn has_operand(self) -> bool {
        !matches!(self.row().operand, Ranks::No)
    }

    /// Some rank gets a result.
    pub const fn has_result(self) -> bool {
        !matches!(self.row().result, Ranks::No)
    }

    /// Whether it reads the operand of a rank.
    pub const fn reads(self, is_root: bool) -> bool {
        self.row().operand.have(is_root)
    }

    /// Whether it writes the result of a rank.
    pub const fn writes(self, is_root: bool) -> bool {
        self.row().result.have(is_root)
    }

    /// Whether the result of a rank is its operand, where it has one: MPI writes nothing there.
    pub const fn returns_operand(self, is_root: bool) -> bool {
        self.has_result() && !self.writes(is_root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(has: impl Fn(Kind) -> bool) -> String {
        let kinds = Kind::ALL.iter().filter(|kind| has(**kind));
        kinds.map(|kind| kind.name()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn kinds_have_what_the_standard_gives_them() {
        assert!(
            Kind::ALL
                .iter()
                .enumerate()
                .all(|(n, kind)| *kind as usize == n)
        );
        assert_eq!(names(Kind::has_root), "bcast gather reduce scatter");
        assert_eq!(names(Kind::sends), "send sendrecv isend");
        assert_eq!(names(Kind::receives), "recv sendrecv irecv");
        assert_eq!(names(Kind::is_message), "recv send sendrecv");
        assert_eq!(names(Kind::is_start), "isend irecv");
        assert_eq!(names(Kind::is_end), "wait wait_send");
        let reducing = "allreduce reduce scan exscan reduce_scatter";
        assert_eq!(names(Kind::reduces), reducing);
        let blocks = "allgather alltoall gather scatter reduce_scatter";
        assert_eq!(names(Kind::has_blocks), blocks);
        assert_eq!(names(|kind| !kind.has_operand()), "barrier recv");
        assert_eq!(names(|kind| !kind.has_result()), "barrier send wait_send");
    }

    #[test]
    fn the_root_and_the_others_use_other_arrays() {
        assert_eq!(names(|kind| kind.returns_operand(true)), "bcast");
        assert_eq!(names(|kind| kind.returns_operand(false)), "gather reduce");
        assert!(Kind::Scatter.reads(true) && !Kind::Scatter.reads(false));
        assert!(Kind::Scatter.writes(true) && Kind::Scatter.writes(false));
    }
}
