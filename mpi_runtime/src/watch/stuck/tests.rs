//! Which ranks are stuck, and which may still be helped.

use super::*;

fn wait(kind: Kind, source: i32, dest: i32) -> Wait {
    Wait {
        kind,
        comm: 0,
        members: Vec::new(),
        source,
        dest,
        send_tag: 0,
        recv_tag: 0,
        milliseconds: 5000,
        calls_user: false,
        number: 0,
        words: String::new(),
    }
}

fn told(waits: Vec<Wait>) -> Known {
    Known::Told(State {
        waits,
        ..State::default()
    })
}

fn recv(source: i32) -> Known {
    told(vec![wait(Kind::Recv, source, PROC_NULL)])
}

fn send(dest: i32) -> Known {
    told(vec![wait(Kind::Send, PROC_NULL, dest)])
}

fn collective(kind: Kind) -> Known {
    told(vec![wait(kind, PROC_NULL, PROC_NULL)])
}

fn ended() -> Known {
    Known::Ended("has ended".into())
}

fn of(ranks: &[Known]) -> Vec<i32> {
    stuck(ranks).into_iter().map(|(rank, _)| rank).collect()
}

#[test]
fn circles_of_receives_are_stuck() {
    let three = [recv(1), recv(2), recv(0)];
    assert_eq!(stuck(&three), [(0, 1), (1, 2), (2, 0)]);
    assert_eq!(circle(&stuck(&three)), Some(vec![0, 1, 2]));
    assert_eq!(of(&[recv(1), recv(0), recv(1)]), [0, 1, 2]);
    assert_eq!(
        circle(&stuck(&[recv(2), recv(2), recv(1)])),
        Some(vec![1, 2])
    );
}

#[test]
fn who_may_be_helped_is_not_stuck() {
    // A rank that computes may send to everybody.
    assert!(of(&[recv(1), told(vec![])]).is_empty());
    assert!(of(&[recv(1), recv(2), told(vec![])]).is_empty());
    assert!(of(&[recv(1), Known::Nothing]).is_empty());
    // A message that is on its way.
    assert!(of(&[recv(1), send(0)]).is_empty());
    assert!(of(&[recv(ANY), send(0), recv(0)]).is_empty());
    assert!(of(&[collective(Kind::Allreduce), collective(Kind::Allreduce)]).is_empty());
    // mpi4py may send there.
    let mut users = wait(Kind::Recv, 1, PROC_NULL);
    users.comm = 1 << 61;
    assert!(of(&[told(vec![users]), recv(0)]).is_empty());
    // One of two threads may go on.
    let mut two = wait(Kind::Recv, 1, PROC_NULL);
    two.comm = 1;
    let both = told(vec![two, wait(Kind::Recv, 1, PROC_NULL)]);
    assert!(of(&[both, recv(0)]).is_empty());
}

#[test]
fn a_collective_that_was_started_is_on_its_way() {
    let started = |comm| Wait {
        comm,
        ..wait(Kind::Iallreduce, PROC_NULL, PROC_NULL)
    };
    let waits = || told(vec![started(0)]);
    let receives_meanwhile = |comm| {
        Known::Told(State {
            waits: vec![wait(Kind::Recv, 0, PROC_NULL)],
            background: vec![started(comm)],
            ..State::default()
        })
    };
    assert!(of(&[waits(), receives_meanwhile(0)]).is_empty());
    assert_eq!(of(&[waits(), receives_meanwhile(1)]), [0, 1]);
    assert_eq!(of(&[waits(), recv(0)]), [0, 1]);
    // A root may have done its part.
    let gets = told(vec![wait(Kind::Ibcast, PROC_NULL, PROC_NULL)]);
    assert!(of(&[gets, told(vec![])]).is_empty());
}

#[test]
fn who_has_begun_a_collective_has_done_its_part() {
    let third = |comm| Wait {
        comm,
        number: 3,
        ..wait(Kind::Allreduce, PROC_NULL, PROC_NULL)
    };
    let receives_after = |begun: u64, all_begun| {
        Known::Told(State {
            waits: vec![wait(Kind::Recv, 0, PROC_NULL)],
            begun: vec![(1, begun)],
            all_begun,
            ..State::default()
        })
    };
    let moves = |comm| told(vec![third(comm)]);
    // What the last ones still move may take longer than it takes to ask.
    assert!(of(&[moves(1), moves(1), receives_after(3, true)]).is_empty());
    let before_it = [moves(1), moves(1), receives_after(2, true)];
    assert_eq!(of(&before_it), [0, 1, 2]);
    // On another communicator it has begun none, if it knows of all.
    assert_eq!(of(&[moves(7), receives_after(3, true)]), [0, 1]);
    assert!(of(&[moves(7), receives_after(3, false)]).is_empty());
}

#[test]
fn who_waits_for_one_that_has_ended_is_stuck() {
    assert_eq!(stuck(&[recv(1), ended()]), [(0, 1)]);
    assert_eq!(of(&[send(1), ended()]), [0]);
    assert_eq!(of(&[recv(ANY), ended(), ended()]), [0]);
    assert_eq!(of(&[collective(Kind::Barrier), told(vec![]), ended()]), [0]);
    assert_eq!(circle(&stuck(&[recv(1), ended()])), None);
}

#[test]
fn a_message_in_the_background_is_one_that_may_still_arrive() {
    let with = |waits: Wait, background: Wait| {
        Known::Told(State {
            waits: vec![waits],
            background: vec![background],
            ..State::default()
        })
    };
    let isend = |dest| wait(Kind::Isend, PROC_NULL, dest);
    let irecv = |source| wait(Kind::Irecv, source, PROC_NULL);
    let waits_for_isend = |dest| with(isend(dest), isend(dest));
    // Both wait for a long message of theirs, and receive only then.
    assert_eq!(of(&[waits_for_isend(1), waits_for_isend(0)]), [0, 1]);
    assert_eq!(of(&[waits_for_isend(1), ended()]), [0]);
    assert_eq!(of(&[waits_for_isend(1), recv(2), recv(1)]), [0, 1, 2]);
    // The receive was started, or will be.
    assert!(of(&[waits_for_isend(1), with(isend(0), irecv(0))]).is_empty());
    assert!(of(&[waits_for_isend(1), told(vec![])]).is_empty());
    // What rank 0 has started gets to rank 1, but a message with another tag does not.
    let receive = wait(Kind::Recv, 1, PROC_NULL);
    assert!(of(&[with(receive.clone(), isend(1)), recv(0)]).is_empty());
    let mut other_tag = isend(1);
    other_tag.send_tag = 3;
    assert_eq!(of(&[with(receive.clone(), other_tag), recv(0)]), [0, 1]);
    assert_eq!(of(&[with(receive, isend(2)), recv(0), recv(1)]), [0, 1, 2]);
}

#[test]
fn on_communicators_of_the_users_only_the_end_of_others_is_known() {
    let users = |mut wait: Wait| {
        wait.comm = 1 << 61;
        told(vec![wait])
    };
    let any = || users(wait(Kind::Recv, ANY, PROC_NULL));
    let collective = || users(wait(Kind::Allreduce, PROC_NULL, PROC_NULL));
    let long = || users(wait(Kind::Send, PROC_NULL, 1));
    for waits in [any(), collective(), long()] {
        assert_eq!(of(&[waits.clone(), ended()]), [0]);
        assert!(of(&[waits, recv(0)]).is_empty());
    }
    assert!(of(&[any(), ended(), recv(0)]).is_empty());
    assert_eq!(of(&[collective(), ended(), recv(0)]), [0, 2]);
    let mut apart = wait(Kind::Allreduce, PROC_NULL, PROC_NULL);
    apart.members = vec![0, 2];
    assert!(of(&[users(apart), ended(), recv(0)]).is_empty());
}

#[test]
fn who_may_have_done_its_part_is_not_missed() {
    // Rank 2 has sent its part to rank 0, and rank 1 may still come.
    for last in [ended(), recv(0)] {
        let root = collective(Kind::Gather);
        assert!(of(&[root, told(vec![]), last]).is_empty());
    }
    let bcast = || collective(Kind::Bcast);
    assert_eq!(of(&[ended(), bcast(), bcast()]), [1, 2]);
    assert_eq!(of(&[recv(1), bcast(), bcast()]), [0, 1, 2]);
}

#[test]
fn who_computes_a_reduction_of_the_users_is_not_stuck() {
    for kind in [Kind::Reduce, Kind::Allreduce, Kind::Scan] {
        let waits = collective(kind);
        assert_eq!(of(&[waits.clone(), recv(0)]), [0, 1]);
        let mut computes = wait(kind, PROC_NULL, PROC_NULL);
        computes.calls_user = true;
        let computes = told(vec![computes]);
        assert!(of(&[computes.clone(), recv(0)]).is_empty());
        let ranks = [computes.clone(), ended()];
        assert_eq!((of(&ranks), bereft(&ranks)), (vec![], None));
        // Others of the same collective may wait in MPI for that rank.
        assert!(of(&[computes, waits]).is_empty());
    }
}

#[test]
fn an_operation_without_a_rank_that_has_ended_never_ends() {
    let of_two_threads = |waits| {
        Known::Told(State {
            waits,
            others: true,
            ..State::default()
        })
    };
    let barrier = wait(Kind::Barrier, PROC_NULL, PROC_NULL);
    let ranks = [of_two_threads(vec![barrier]), ended()];
    assert_eq!((of(&ranks), bereft(&ranks)), (vec![], Some((0, 1))));
    let sends = [
        wait(Kind::Send, PROC_NULL, 1),
        wait(Kind::Isend, PROC_NULL, 2),
    ];
    let ranks = [of_two_threads(sends.into()), told(vec![]), ended()];
    assert_eq!(bereft(&ranks), Some((0, 2)));
    // A rank may send to itself, and may still receive the other half.
    for receives in [Kind::Recv, Kind::Sendrecv] {
        let receive = wait(receives, ANY, 1);
        assert_eq!(bereft(&[of_two_threads(vec![receive]), ended()]), None);
    }
}

#[test]
fn who_compares_what_another_has_not_compared_waits_in_vain() {
    let rank = |executed, begun, waits| {
        Known::Told(State {
            compared: vec![(0, 0, false).into(), (executed, begun, waits).into()],
            ..State::default()
        })
    };
    let compares = || rank(9, 3, true);
    assert_eq!(passed(&[rank(9, 2, false), compares()]), Some((1, 0)));
    assert_eq!(
        passed(&[compares(), Known::Nothing, rank(12, 2, false)]),
        Some((0, 2))
    );
    // It may still come, or has come.
    for other in [
        rank(8, 2, false),
        rank(9, 3, true),
        rank(9, 3, false),
        compares(),
    ] {
        assert_eq!(passed(&[compares(), other]), None);
    }
}

#[test]
fn what_does_not_match_is_stuck() {
    assert_eq!(of(&[collective(Kind::Barrier), recv(0)]), [0, 1]);
    assert_eq!(of(&[send(1), send(0)]), [0, 1]);
    let mut tag = wait(Kind::Recv, 1, PROC_NULL);
    tag.recv_tag = 3;
    assert_eq!(of(&[told(vec![tag.clone()]), send(0)]), [0, 1]);
    tag.recv_tag = ANY;
    assert!(of(&[told(vec![tag]), send(0)]).is_empty());
}
