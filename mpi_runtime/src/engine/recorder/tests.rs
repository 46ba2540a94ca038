use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use mpi_shim_abi::Reduction;

use super::super::about::About;
use super::super::profile::Profile;
use super::super::{layout, profiled, texts};
use super::*;
use crate::buffer::{Buffer, ElementType};

fn recorder() -> Box<Recorder> {
    Box::new(Recorder::new())
}

fn array(shape: &[i64]) -> Buffer<'_> {
    Buffer::described(ElementType::F32, shape)
}

fn communicator() -> Option<Communicator> {
    Some(Communicator {
        name: "mine",
        handle: 0,
        user_handle: 0,
        rank: 1,
        size: 2,
        members: &[],
        largest_tag: 0,
        freed: false,
    })
}

fn allreduce(recorder: &Recorder, comm: i64) -> Recording<'_> {
    let op = Operation {
        reduction: Some(Reduction::Max),
        ..Operation::new(Kind::Allreduce, comm, array(&[3, 4]), array(&[3, 4]))
    };
    recorder.begin(Ticket(7), &op, communicator)
}

fn load(field: &AtomicU64) -> u64 {
    field.load(Ordering::Relaxed)
}

#[test]
fn an_operation_is_entered_when_it_begins_and_has_an_end_when_it_ends() {
    let recorder = recorder();
    assert_eq!(recorder.running(), 0);
    let running = allreduce(&recorder, 1);
    assert_eq!(recorder.running(), 1);
    let entry = recorder.entry(1);
    assert_eq!((load(&entry.number), load(&entry.number_again)), (1, 1));
    assert_eq!((load(&entry.end), load(&entry.position)), (0, 1));
    assert_eq!((load(&entry.sent), load(&entry.received)), (12, 12));
    let what = load(&entry.what).to_le_bytes();
    assert_eq!(what[0], Kind::Allreduce as u8);
    assert_eq!(what[1], Reduction::Max as u8);
    assert_eq!(what[2], ElementType::F32 as u8);
    assert_eq!(load(&entry.launch_thread) >> 32, 7);
    let start = Ticks::now();
    recorder.waited(start);
    running.end(&Ok(()));
    assert_eq!(recorder.running(), 0);
    assert!(load(&entry.end) >= load(&entry.start));
    assert!(load(&entry.waited) <= load(&entry.end) - load(&entry.start));
    recorder.waited(start);
    assert!(load(&entry.waited) < start.0, "no operation runs any more");
}

#[test]
fn a_failed_operation_says_why() {
    let recorder = recorder();
    let error = Box::new(OperationError {
        operation: "allreduce".into(),
        rank: 0,
        comm: "COMM_WORLD".into(),
        size: 2,
        reason: "the ranks differ".into(),
    });
    allreduce(&recorder, 0).end(&Err(error));
    let entry = recorder.entry(1);
    assert_eq!(load(&entry.failed), 1);
    assert!(text_of(&recorder, load(&entry.text)).contains("the ranks differ"));
}

fn text_of(recorder: &Recorder, number: u64) -> String {
    texts::get(&recorder.record, number)
}

#[test]
fn the_ring_keeps_the_last_and_those_that_have_not_ended() {
    let recorder = recorder();
    let slow = allreduce(&recorder, 1);
    for _ in 0..ENTRIES + 5 {
        allreduce(&recorder, 2).end(&Ok(()));
    }
    let unfinished = &recorder.record.unfinished;
    assert_eq!(load(&unfinished[0].number), 1);
    assert_eq!(load(&unfinished[0].comm), 1);
    assert_eq!(load(&unfinished[1].number), 0);
    let last = ENTRIES as u64 + 6;
    assert_eq!(load(&recorder.entry(last).number), last);
    assert_eq!(load(&recorder.entry(last).position), last - 1);
    slow.end(&Ok(()));
    assert_eq!(load(&unfinished[0].number), 0);
}

#[test]
fn collectives_and_messages_are_counted_for_each_communicator() {
    let recorder = recorder();
    for comm in [1, 1 << 61, 1, (1 << 61) + COMMS as i64, 1] {
        allreduce(&recorder, comm).end(&Ok(()));
    }
    let positions: Vec<u64> = (1..=5)
        .map(|number| load(&recorder.entry(number).position))
        .collect();
    assert_eq!(positions, [1, 1, 2, 1, 3]);
    let send = Operation::new(Kind::Send, 1, array(&[2]), Buffer::NONE);
    recorder.begin(Ticket(0), &send, communicator).end(&Ok(()));
    assert_eq!(load(&recorder.entry(6).position), 1);
    let row = recorder.comm_row(1).unwrap();
    assert_eq!((load(&row.collectives), load(&row.messages)), (3, 1));
    assert_eq!(text_of(&recorder, load(&row.name)), "mine");
    assert_eq!(row.rank.load(Ordering::Relaxed), 1);
}

#[test]
fn more_communicators_than_rows_are_not_counted() {
    let recorder = recorder();
    for comm in 0..=COMMS as i64 {
        allreduce(&recorder, comm).end(&Ok(()));
    }
    assert_eq!(load(&recorder.entry(COMMS as u64).position), 1);
    assert_eq!(load(&recorder.entry(COMMS as u64 + 1).position), 0);
}

#[test]
fn threads_enter_at_once() {
    let recorder: Arc<Recorder> = recorder().into();
    let threads: Vec<_> = (0..4)
        .map(|comm| {
            let recorder = recorder.clone();
            std::thread::spawn(move || {
                for _ in 0..2000 {
                    allreduce(&recorder, comm).end(&Ok(()));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|one| one.join().unwrap());
    assert_eq!(load(&recorder.record.header.operations), 8000);
    for comm in 0..4 {
        assert_eq!(load(&recorder.comm_row(comm).unwrap().collectives), 2000);
    }
}

#[test]
fn a_text_is_kept_once_until_no_room_is_left() {
    let recorder = recorder();
    let first = recorder.text(b"step.py:12");
    assert_eq!(recorder.text(b"step.py:12"), first);
    assert_eq!(text_of(&recorder, u64::from(first)), "step.py:12");
    assert_eq!(recorder.text(b""), 0);
    let mut numbers = (0..1000).map(|number| recorder.text(format!("{number:0300}").as_bytes()));
    assert!(numbers.any(|number| number == 0));
    assert_eq!(recorder.text(b"step.py:12"), first);
}

#[test]
fn what_ended_it_stays_the_reason() {
    let recorder = recorder();
    let reason = || {
        let header = &recorder.record.header;
        let code = header.code.load(Ordering::Relaxed);
        (header.reason.load(Ordering::Relaxed), code)
    };
    recorder.mark(Reason::Running, 0);
    recorder.mark(Reason::Abort, 3);
    recorder.mark(Reason::Signal, libc::SIGTERM);
    assert_eq!(reason(), (Reason::Abort as u32, 3));
    assert!(load(&recorder.record.header.written_wall) > 1 << 60);
}

#[test]
fn the_ranks_of_a_program_have_the_same_number_on_all_of_them() {
    assert_eq!(number_of(&[2, 0]), number_of(&[0, 2]));
    assert!(number_of(&[0, 2]) < -1 && number_of(&[0, 2]) != number_of(&[0, 1]));
    let recorder = recorder();
    for members in [&[0, 1, 2][..], &[0, 2], &[0, 1, 2]] {
        let program = Program {
            sequence: 9,
            summary: "all-reduce f32[4] SUM",
            members,
            everybody: members.len() == 3,
        };
        recorder.begin_program(Ticket(1), &program).end(&Ok(()));
    }
    assert_eq!(load(&recorder.entry(3).comm), COLLECTIVES as u64);
    assert_eq!(load(&recorder.entry(3).position), 2);
    assert_eq!(load(&recorder.entry(2).comm), number_of(&[0, 2]) as u64);
    let text = load(&recorder.entry(3).text);
    assert_eq!(text_of(&recorder, text), "all-reduce f32[4] SUM");
}

#[test]
fn the_description_fits_and_is_json() {
    let recorder = recorder();
    let about = About {
        rank: 3,
        size: 4,
        job: 5,
        library: "a \"library\"\n".repeat(20),
    };
    about.write(&recorder.record);
    let bytes = recorder.record.about.iter();
    let bytes: Vec<u8> = bytes.map(|byte| byte.load(Ordering::Relaxed)).collect();
    let text = String::from_utf8(bytes).unwrap();
    let text = text.trim_end_matches('\0');
    assert!(text.starts_with(r#"{"rank":3,"size":4,"job":5,"library":"a \"library\"\u000a"#));
    assert!(
        text.ends_with('}') && text.len() < layout::ABOUT_BYTES - 1000,
        "{}",
        text.len()
    );
}

#[test]
fn a_wait_says_what_it_waits_for() {
    let recorder = recorder();
    let started = Operation {
        source: 1,
        recv_tag: 9,
        ..Operation::new(Kind::Irecv, 1, array(&[2]), array(&[]))
    };
    let wait = Operation::new(Kind::Wait, 1, array(&[]), array(&[2]));
    let running = recorder.begin(Ticket(1), &wait, communicator);
    recorder.waits_for(&started);
    running.end(&Ok(()));
    recorder.waits_for(&wait);
    let entry = recorder.entry(1);
    assert_eq!(load(&entry.ranks), pair(0, 1));
    assert_eq!(load(&entry.tags), pair(0, 9));
    assert_eq!(load(&entry.what) & STARTED, STARTED);
    let running = recorder.begin(Ticket(1), &wait, communicator);
    recorder.waits_for(&Operation::new(Kind::Iscan, 1, array(&[2]), array(&[])));
    running.end(&Ok(()));
    let entry = recorder.entry(2);
    assert_eq!(load(&entry.what) & STARTED, 0);
    assert_eq!(load(&entry.what) >> ENDS, Kind::Iscan as u64 + 1);
}

/// The profile of this process, which other tests add to.
#[test]
fn a_profile_has_what_ran_while_it_was_taken() {
    const COMM: i64 = 777;
    allreduce(&RECORDER, COMM).end(&Ok(()));
    assert!(RECORDER.start_profile() && !RECORDER.start_profile());
    RECORDER.launch(Ticket(7), RECORDER.text(b"jit_step"), b"step.py:12");
    let running = allreduce(&RECORDER, COMM);
    let start = Ticks::now();
    std::thread::sleep(std::time::Duration::from_millis(2));
    RECORDER.waited(start);
    RECORDER.met();
    running.end(&Ok(()));
    let waits = allreduce(&RECORDER, COMM);
    let mut seen = profiled::stop().unwrap();
    assert!(profiled::stop().is_none());
    waits.end(&Ok(()));
    seen.operations.retain(|one| one.comm == COMM);
    let [ended, not_ended] = &seen.operations[..] else {
        panic!("{seen:?}")
    };
    assert!(ended.ended && !not_ended.ended && not_ended.time.end == seen.end);
    assert_eq!(ended.kind, Some(Kind::Allreduce));
    assert_eq!(
        (ended.reduction, ended.comm_name.as_str()),
        (Some("MAX"), "mine")
    );
    assert_eq!(
        ended.operand.map(|of| (of.count, of.bytes())),
        Some((12, 48))
    );
    assert_eq!(
        (ended.program.as_str(), ended.location.as_str()),
        ("jit_step", "step.py:12")
    );
    let [wait] = &ended.waits[..] else {
        panic!("{ended:?}")
    };
    assert!(wait.end - wait.start > 1_500_000);
    assert!(ended.time.start <= wait.start && Some(wait.end) <= ended.met);
    assert!(ended.met <= Some(ended.time.end) && ended.time.end <= seen.end);
}

#[test]
fn a_profile_counts_what_it_has_no_room_for() {
    let (recorder, profile) = (recorder(), Profile::new(3));
    assert!(profile.start());
    for _ in 0..5 {
        allreduce(&recorder, 1).end(&Ok(()));
        profile.keep(1, Event::of(recorder.entry(1), Some(Ticks::now()), (0, 0)));
    }
    let taken = profile.stop(Vec::new).unwrap();
    assert_eq!((taken.events.len(), taken.lost), (3, 2));
    assert!(
        profiled::said_of_lost(2)
            .unwrap()
            .contains("not the 2 after them")
    );
    assert!(profile.start());
    assert_eq!(profile.stop(Vec::new).unwrap().events.len(), 0);
}

#[test]
#[ignore = "a measurement, for a release build alone on a core"]
fn what_an_entry_costs() {
    let recorder = recorder();
    let mut best = f64::INFINITY;
    for _ in 0..50 {
        let start = std::time::Instant::now();
        for _ in 0..100_000 {
            allreduce(&recorder, 1).end(&Ok(()));
        }
        best = best.min(start.elapsed().as_secs_f64() / 1e5);
    }
    println!("an entry costs {:.1} ns", best * 1e9);
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        assert!(recorder.start_profile());
        let start = std::time::Instant::now();
        for _ in 0..100_000 {
            allreduce(&recorder, 1).end(&Ok(()));
        }
        best = best.min(start.elapsed().as_secs_f64() / 1e5);
        assert_eq!(recorder.stop_profile().unwrap().lost, 0);
    }
    println!("and {:.1} ns while a profile is taken", best * 1e9);
}
