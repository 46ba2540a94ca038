//! What is refused, and with which words.

use super::*;

const COMM: Communicator = Communicator {
    name: "test",
    handle: 5,
    user_handle: 5,
    rank: 1,
    size: 4,
    members: &[],
    largest_tag: 0,
    freed: false,
};

fn buffer(dtype: ElementType, shape: &[i64]) -> Buffer<'_> {
    Buffer::described(dtype, shape)
}

fn operation<'a>(kind: Kind, send: Buffer<'a>, recv: Buffer<'a>) -> Operation<'a> {
    Operation {
        source: 0,
        recv_tag: 0,
        ..Operation::new(kind, 0, send, recv)
    }
}

#[test]
fn ranks_outside_the_communicator_are_refused() {
    let x = buffer(ElementType::F32, &[3]);
    for kind in [Kind::Bcast, Kind::Reduce, Kind::Send, Kind::Sendrecv] {
        for peer in [-1, 4, 1000] {
            let op = Operation {
                root: peer,
                dest: peer,
                ..operation(kind, x, x)
            };
            let text = prepare(&op, &COMM).unwrap_err().to_string();
            assert!(
                text.contains(&peer.to_string()) && text.contains("0 to 3"),
                "{text}"
            );
        }
    }
    let op = Operation {
        source: 4,
        ..operation(Kind::Recv, Buffer::NONE, x)
    };
    assert!(
        prepare(&op, &COMM)
            .unwrap_err()
            .to_string()
            .contains("source 4")
    );
    for source in [ANY, PROC_NULL] {
        let op = Operation {
            source,
            ..operation(Kind::Recv, Buffer::NONE, x)
        };
        assert!(prepare(&op, &COMM).is_ok());
    }
}

#[test]
fn tags_must_not_be_negative() {
    let x = buffer(ElementType::F32, &[3]);
    let op = Operation {
        send_tag: -3,
        ..operation(Kind::Send, x, Buffer::NONE)
    };
    assert!(
        prepare(&op, &COMM)
            .unwrap_err()
            .to_string()
            .contains("negative")
    );
}

#[test]
fn reductions_follow_the_standard() {
    use ElementType::{BF16, Bool, C64, F8E5M2, F32, I4, I16};
    let allowed = [
        (Bool, "SUM PROD MIN MAX LAND LOR LXOR BAND BOR BXOR"),
        (BF16, "SUM PROD MIN MAX"),
        (F8E5M2, ""),
        (I4, ""),
        (I16, "SUM PROD MIN MAX LAND LOR LXOR BAND BOR BXOR"),
        (F32, "SUM PROD MIN MAX"),
        (C64, "SUM PROD"),
    ];
    for (dtype, names) in allowed {
        for (reduction, name) in crate::operation::REDUCTIONS {
            let x = buffer(dtype, &[3]);
            let op = Operation {
                reduction: Some(reduction),
                ..operation(Kind::Allreduce, x, x)
            };
            let expected = names.split(' ').any(|allowed| allowed == name);
            assert_eq!(
                prepare(&op, &COMM).is_ok(),
                expected,
                "{name} of {}",
                dtype.name()
            );
        }
    }
}

#[test]
fn blocks_of_neighbours_must_fit() {
    let of = |kind, sent: &[i64], received: &[i64]| {
        let op = Operation {
            sources: 2,
            destinations: 3,
            ..operation(
                kind,
                buffer(ElementType::F32, sent),
                buffer(ElementType::F32, received),
            )
        };
        match prepare(&op, &COMM) {
            Ok(shim) => format!("{} of {}", shim.count, shim.sources),
            Err(reason) => reason.to_string(),
        }
    };
    assert_eq!(of(Kind::NeighborAllgather, &[], &[2]), "1 of 2");
    assert_eq!(of(Kind::NeighborAllgather, &[4, 5], &[2, 4, 5]), "20 of 2");
    assert_eq!(of(Kind::NeighborAlltoall, &[3, 4], &[2, 4]), "4 of 2");
    for (kind, sent, received) in [
        (Kind::NeighborAllgather, &[4][..], &[3, 4][..]),
        (Kind::NeighborAlltoall, &[2, 4], &[2, 4]),
        (Kind::NeighborAlltoall, &[3, 4], &[2, 5]),
        (Kind::NeighborAlltoall, &[], &[]),
    ] {
        let text = of(kind, sent, received);
        assert!(
            text.contains("does not fit 2 neighbours to receive from and 3"),
            "{text}"
        );
    }
    let text = of(
        Kind::NeighborAlltoall,
        &[3, 1 << 40, 1 << 40],
        &[2, 1 << 40, 1 << 40],
    );
    assert!(text.contains("no memory can hold"), "{text}");
}

#[test]
fn a_part_of_a_message_says_the_type_of_the_whole() {
    for &dtype in ElementType::ALL {
        assert_eq!(dtype_of(code(dtype)), Some(dtype));
    }
    assert_eq!(
        (dtype_of(0), dtype_of(ANY_CODE), dtype_of(i32::MIN)),
        (None, None, None)
    );
    let bytes = buffer(ElementType::U8, &[25]);
    let own = Communicator {
        largest_tag: 100,
        ..COMM
    };
    for kind in [Kind::Send, Kind::Recv, Kind::Sendrecv] {
        let mut part = prepare(&operation(kind, bytes, bytes), &own).unwrap();
        code_part(&mut part, ElementType::F64);
        assert_eq!(part.send_code, code(ElementType::F64));
        assert!(part.accepts_code(code(ElementType::I4)));
        // On communicators of the user's there are none.
        let mut part = prepare(&operation(kind, bytes, bytes), &COMM).unwrap();
        code_part(&mut part, ElementType::F64);
        assert_eq!((part.send_code, part.recv_code), (0, 0));
    }
    let whole = prepare(&operation(Kind::Recv, bytes, bytes), &own).unwrap();
    let accepted: Vec<i32> = (0..ANY_CODE)
        .filter(|&code| whole.accepts_code(code))
        .collect();
    assert_eq!(accepted, [0, code(ElementType::U8)]);
}

#[test]
fn results_must_fit() {
    let (one, four) = (
        buffer(ElementType::F32, &[3]),
        buffer(ElementType::F32, &[4, 3]),
    );
    assert!(prepare(&operation(Kind::Allgather, one, four), &COMM).is_ok());
    assert!(prepare(&operation(Kind::Allgather, one, one), &COMM).is_err());
    assert!(prepare(&operation(Kind::Alltoall, four, four), &COMM).is_ok());
    let text = prepare(&operation(Kind::Alltoall, one, one), &COMM)
        .unwrap_err()
        .to_string();
    assert!(text.contains("leading dimension is 3"), "{text}");
    // Rank 1 is not the root: it passes and gets its own shape.
    assert!(prepare(&operation(Kind::Gather, one, one), &COMM).is_ok());
    assert!(prepare(&operation(Kind::Scatter, four, one), &COMM).is_err());
    let root = Communicator { rank: 0, ..COMM };
    assert!(prepare(&operation(Kind::Scatter, four, one), &root).is_ok());
    assert!(prepare(&operation(Kind::Gather, one, one), &root).is_err());
    assert!(prepare(&operation(Kind::ReduceScatter, four, one), &COMM).is_ok());
    assert!(prepare(&operation(Kind::ReduceScatter, one, four), &COMM).is_err());
}

#[test]
fn an_operand_and_a_result_lie_apart() {
    let mut memory = [0; 24];
    let all = Buffer::over(&mut memory, ElementType::F32, &[6]);
    let at = |place: usize| all.part(4 * place, &buffer(ElementType::F32, &[3]));
    let (whole, other, between) = (at(0), at(3), at(2));
    let prepared = |kind, recv| prepare(&operation(kind, whole, recv), &COMM);
    for kind in [Kind::Allreduce, Kind::Sendrecv] {
        assert!(prepared(kind, other).is_ok());
        for overlapping in [whole, between] {
            let text = prepared(kind, overlapping).unwrap_err().to_string();
            assert!(text.contains("input_output_aliases"), "{text}");
        }
    }
    // Rank 1 is not the root: it reads nothing, or gets nothing.
    assert!(prepared(Kind::Bcast, whole).is_ok() && prepared(Kind::Gather, whole).is_ok());
}

#[test]
fn unsupported_dtypes_and_freed_communicators_are_refused_by_name() {
    let x = buffer(ElementType::Other, &[1]);
    assert!(
        prepare(&operation(Kind::Bcast, x, x), &COMM)
            .unwrap_err()
            .to_string()
            .contains("less than 8 bits")
    );
    let freed = Communicator {
        largest_tag: 0,
        freed: true,
        ..COMM
    };
    let text = prepare(
        &operation(Kind::Barrier, Buffer::NONE, Buffer::NONE),
        &freed,
    );
    assert!(text.unwrap_err().to_string().contains("freed"));
}

#[test]
fn a_start_is_checked_as_what_it_starts() {
    let number = buffer(ElementType::U32, &[]);
    let rows = buffer(ElementType::F32, &[4, 3]);
    for (kind, result) in [
        (Kind::Iallgather, 48),
        (Kind::Iallreduce, 12),
        (Kind::Igather, 48),
        (Kind::Iscatter, 3),
        (Kind::IreduceScatter, 3),
        (Kind::Ibarrier, 0),
    ] {
        let op = Operation {
            root: COMM.rank,
            reduction: kind.reduces().then_some(Reduction::Sum),
            ..operation(kind, rows, number)
        };
        assert_eq!(result_elements(&op, &COMM), result, "{kind:?}");
        let shim = prepare(&op, &COMM).unwrap();
        assert_eq!(shim.kind, kind.started());
        let off_root = Operation { root: 0, ..op };
        let elsewhere = if kind.has_root() { 12 } else { result };
        assert_eq!(result_elements(&off_root, &COMM), elsewhere, "{kind:?}");
    }
    let uneven = operation(Kind::IreduceScatter, buffer(ElementType::F32, &[6]), number);
    let reason = prepare(&uneven, &COMM).unwrap_err().to_string();
    assert!(reason.contains("does not fit the operand's 6"), "{reason}");
    let pointless = Operation {
        reduction: Some(Reduction::Max),
        ..operation(Kind::Iallreduce, buffer(ElementType::C64, &[2]), number)
    };
    let reason = prepare(&pointless, &COMM).unwrap_err().to_string();
    assert_eq!(reason, "there is no MAX of complex64");
}

#[test]
fn a_start_is_one_call_of_mpi() {
    let (number, x) = (
        buffer(ElementType::U32, &[]),
        buffer(ElementType::F32, &[4]),
    );
    let start = |kind, reduction, most| {
        let op = Operation {
            reduction,
            ..operation(kind, x, number)
        };
        let shim = prepare(&op, &COMM).unwrap();
        check_start(&shim, &op, &COMM, most).map_err(|reason| reason.to_string())
    };
    assert_eq!(start(Kind::Ibcast, None, 16), Ok(()));
    assert_eq!(start(Kind::Iallgather, None, 64), Ok(()));
    let reason = start(Kind::Iallgather, None, 63).unwrap_err();
    assert!(reason.contains("has 64; use allgather"), "{reason}");
    assert!(start(Kind::Ibcast, None, 15).is_err());
    assert_eq!(start(Kind::Iscan, Some(Reduction::Sum), 16), Ok(()));
    let reason = start(Kind::Iscan, Some(Reduction::User), 16).unwrap_err();
    assert!(reason.contains("use scan"), "{reason}");
}
