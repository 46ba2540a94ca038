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
    /// The start of a collective (MPI 4.0, section 6.12; [`crate::ShimApi::start_collective`]).
    CollectiveStart,
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
    /// It has a block for each rank, or for each neighbour, in its operand or its result.
    Blocks = 2,
    /// It sends a message to `dest`.
    Sends = 4,
    /// It receives a message from `source`.
    Receives = 8,
    /// It has a block for each rank, of a length of its own.
    Counts = 16,
    /// Each rank exchanges with its neighbours alone, in the topology of the communicator.
    Neighbors = 32,
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
    // The result of a start, and the operand of an end, is the number of what was started.
    Isend = "isend", Start, All, All, [Sends];
    Irecv = "irecv", Start, All, All, [Receives];
    Wait = "wait", End, All, All, [];
    WaitSend = "wait_send", End, All, No, [];
    // The vector variants.
    Allgatherv = "allgatherv", Collective, All, All, [Counts];
    Gatherv = "gatherv", Collective, All, Root, [Counts];
    Scatterv = "scatterv", Collective, Root, All, [Counts];
    Alltoallv = "alltoallv", Collective, All, All, [Counts];
    // Those of neighbourhoods.
    NeighborAllgather = "neighbor_allgather", Collective, All, All, [Blocks, Neighbors];
    NeighborAlltoall = "neighbor_alltoall", Collective, All, All, [Blocks, Neighbors];
    // The starts of collectives.
    Iallgather = "iallgather", CollectiveStart, All, All, [Blocks];
    Iallreduce = "iallreduce", CollectiveStart, All, All, [Reduces];
    Ialltoall = "ialltoall", CollectiveStart, All, All, [Blocks];
    Ibarrier = "ibarrier", CollectiveStart, No, All, [];
    Ibcast = "ibcast", CollectiveStart, Root, All, [];
    Igather = "igather", CollectiveStart, All, All, [Blocks];
    Ireduce = "ireduce", CollectiveStart, All, All, [Reduces];
    Iscan = "iscan", CollectiveStart, All, All, [Reduces];
    Iscatter = "iscatter", CollectiveStart, Root, All, [Blocks];
    Iexscan = "iexscan", CollectiveStart, All, All, [Reduces];
    IreduceScatter = "ireduce_scatter", CollectiveStart, All, All, [Reduces, Blocks];
}

/// A set of kinds, a bit for each: asked on the path of every operation, where the table is not.
#[derive(Clone, Copy)]
struct Set(u64);

impl Set {
    /// The kinds that MPI executes like that.
    const fn executed(execution: Execution) -> Set {
        let (mut set, mut kind) = (0, 0);
        while kind < TABLE.len() {
            set |= ((TABLE[kind].execution as u32 == execution as u32) as u64) << kind;
            kind += 1;
        }
        Set(set)
    }

    /// The kinds with a trait.
    const fn with(wanted: Trait) -> Set {
        let (mut set, mut kind) = (0, 0);
        while kind < TABLE.len() {
            set |= ((TABLE[kind].traits & wanted as u8 != 0) as u64) << kind;
            kind += 1;
        }
        Set(set)
    }

    /// The kinds of which an array is used on the root, or on the others.
    const fn used(result: bool, is_root: bool) -> Set {
        let (mut set, mut kind) = (0, 0);
        while kind < TABLE.len() {
            let row = &TABLE[kind];
            let ranks = if result { row.result } else { row.operand };
            set |= (ranks.have(is_root) as u64) << kind;
            kind += 1;
        }
        Set(set)
    }

    /// The kinds of which one rank differs from the others.
    const fn rooted() -> Set {
        let (mut set, mut kind) = (0, 0);
        while kind < TABLE.len() {
            let row = &TABLE[Kind::ALL[kind].started() as usize];
            let reads = row.operand.have(true) != row.operand.have(false);
            let writes = row.result.have(true) != row.result.have(false);
            set |= ((reads || writes) as u64) << kind;
            kind += 1;
        }
        Set(set)
    }

    const fn or(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }

    #[inline]
    const fn has(self, kind: Kind) -> bool {
        self.0 >> kind as u32 & 1 != 0
    }
}

/// The kinds that use an array on the root, and on the others.
const READ_BY_ROOT: Set = Set::used(false, true);
const READ_BY_OTHERS: Set = Set::used(false, false);
const WRITTEN_BY_ROOT: Set = Set::used(true, true);
const WRITTEN_BY_OTHERS: Set = Set::used(true, false);

impl Kind {
    /// Lower-case name, as users write it.
    pub const fn name(self) -> &'static str {
        TABLE[self as usize].name
    }

    /// All ranks of the communicator take part.
    #[inline]
    pub const fn is_collective(self) -> bool {
        const SET: Set =
            Set::executed(Execution::Collective).or(Set::executed(Execution::CollectiveStart));
        SET.has(self)
    }

    /// It starts a collective, which another operation ends.
    #[inline]
    pub const fn starts_collective(self) -> bool {
        const SET: Set = Set::executed(Execution::CollectiveStart);
        SET.has(self)
    }

    /// The collective that it starts; itself if it starts none.
    pub const fn started(self) -> Kind {
        match self {
            Kind::Iallgather => Kind::Allgather,
            Kind::Iallreduce => Kind::Allreduce,
            Kind::Ialltoall => Kind::Alltoall,
            Kind::Ibarrier => Kind::Barrier,
            Kind::Ibcast => Kind::Bcast,
            Kind::Igather => Kind::Gather,
            Kind::Ireduce => Kind::Reduce,
            Kind::Iscan => Kind::Scan,
            Kind::Iscatter => Kind::Scatter,
            Kind::Iexscan => Kind::Exscan,
            Kind::IreduceScatter => Kind::ReduceScatter,
            other => other,
        }
    }

    /// It is a message between two ranks, from its start to its end.
    #[inline]
    pub const fn is_message(self) -> bool {
        const SET: Set = Set::executed(Execution::Message);
        SET.has(self)
    }

    /// It starts a message or a collective, which another operation ends.
    #[inline]
    pub const fn is_start(self) -> bool {
        const SET: Set =
            Set::executed(Execution::Start).or(Set::executed(Execution::CollectiveStart));
        SET.has(self)
    }

    /// It waits for what was started.
    #[inline]
    pub const fn is_end(self) -> bool {
        const SET: Set = Set::executed(Execution::End);
        SET.has(self)
    }

    /// It sends a message, whose receiver is `dest`.
    #[inline]
    pub const fn sends(self) -> bool {
        const SET: Set = Set::with(Trait::Sends);
        SET.has(self)
    }

    /// It receives a message, whose sender is `source`.
    #[inline]
    pub const fn receives(self) -> bool {
        const SET: Set = Set::with(Trait::Receives);
        SET.has(self)
    }

    /// It waits for a message and receives it.
    #[inline]
    pub const fn is_receive(self) -> bool {
        self.is_message() && self.receives()
    }

    /// It combines the operands of the ranks by a reduction.
    #[inline]
    pub const fn reduces(self) -> bool {
        const SET: Set = Set::with(Trait::Reduces);
        SET.has(self)
    }

    /// Its operand or its result has a block for each rank.
    #[inline]
    pub const fn has_blocks(self) -> bool {
        const SET: Set = Set::with(Trait::Blocks);
        SET.has(self)
    }

    /// Its operand or its result has a block for each rank, and each block a length of its own.
    #[inline]
    pub const fn has_counts(self) -> bool {
        const SET: Set = Set::with(Trait::Counts);
        SET.has(self)
    }

    /// It is between neighbours in the topology of the communicator (MPI 4.0, section 8.6).
    #[inline]
    pub const fn has_neighbors(self) -> bool {
        const SET: Set = Set::with(Trait::Neighbors);
        SET.has(self)
    }

    /// One rank differs from the others.
    #[inline]
    pub const fn has_root(self) -> bool {
        const SET: Set = Set::rooted();
        SET.has(self)
    }

    /// Some rank passes an operand.
    #[inline]
    pub const fn has_operand(self) -> bool {
        const SET: Set = READ_BY_ROOT.or(READ_BY_OTHERS);
        SET.has(self)
    }

    /// Some rank gets a result.
    #[inline]
    pub const fn has_result(self) -> bool {
        const SET: Set = WRITTEN_BY_ROOT.or(WRITTEN_BY_OTHERS);
        SET.has(self)
    }

    /// Whether it reads the operand of a rank.
    #[inline]
    pub const fn reads(self, is_root: bool) -> bool {
        if is_root {
            READ_BY_ROOT.has(self)
        } else {
            READ_BY_OTHERS.has(self)
        }
    }

    /// Whether it writes the result of a rank.
    #[inline]
    pub const fn writes(self, is_root: bool) -> bool {
        if is_root {
            WRITTEN_BY_ROOT.has(self)
        } else {
            WRITTEN_BY_OTHERS.has(self)
        }
    }

    /// Whether the result of a rank is its operand, where it has one: MPI writes nothing there.
    #[inline]
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
        let rooted = "bcast gather reduce scatter gatherv scatterv ibcast igather ireduce iscatter";
        assert_eq!(names(Kind::has_root), rooted);
        assert_eq!(names(Kind::sends), "send sendrecv isend");
        assert_eq!(names(Kind::receives), "recv sendrecv irecv");
        assert_eq!(names(Kind::is_message), "recv send sendrecv");
        let starts = "iallgather iallreduce ialltoall ibarrier ibcast igather ireduce iscan \
                      iscatter iexscan ireduce_scatter";
        assert_eq!(names(Kind::starts_collective), starts);
        assert_eq!(names(Kind::is_start), format!("isend irecv {starts}"));
        assert_eq!(names(Kind::is_end), "wait wait_send");
        let reducing = "allreduce reduce scan exscan reduce_scatter iallreduce ireduce iscan \
                        iexscan ireduce_scatter";
        assert_eq!(names(Kind::reduces), reducing);
        let neighbors = "neighbor_allgather neighbor_alltoall";
        let blocks = "allgather alltoall gather scatter reduce_scatter";
        assert_eq!(names(Kind::has_neighbors), neighbors);
        let started = "iallgather ialltoall igather iscatter ireduce_scatter";
        let blocks = format!("{blocks} {neighbors} {started}");
        assert_eq!(names(Kind::has_blocks), blocks);
        let counts = "allgatherv gatherv scatterv alltoallv";
        assert_eq!(names(Kind::has_counts), counts);
        assert_eq!(names(|kind| !kind.has_operand()), "barrier recv ibarrier");
        assert_eq!(names(|kind| !kind.has_result()), "barrier send wait_send");
    }

    #[test]
    fn a_start_is_like_the_collective_that_it_starts() {
        for &kind in Kind::ALL {
            let started = kind.started();
            if !kind.starts_collective() {
                assert_eq!(started, kind);
                continue;
            }
            assert_eq!(kind.name(), format!("i{}", started.name()));
            assert!(started.is_collective() && !started.is_start() && kind.writes(false));
            assert_eq!(kind.has_root(), started.has_root());
            assert_eq!(kind.reduces(), started.reduces());
            assert_eq!(kind.has_blocks(), started.has_blocks());
            for is_root in [true, false] {
                assert_eq!(kind.reads(is_root), started.reads(is_root));
            }
        }
    }

    #[test]
    fn the_root_and_the_others_use_other_arrays() {
        assert_eq!(names(|kind| kind.returns_operand(true)), "bcast");
        let others = names(|kind| kind.returns_operand(false));
        assert_eq!(others, "gather reduce gatherv");
        for scatter in [Kind::Scatter, Kind::Scatterv] {
            assert!(scatter.reads(true) && !scatter.reads(false));
            assert!(scatter.writes(true) && scatter.writes(false));
        }
    }
}
