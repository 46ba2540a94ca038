//! What a rank is doing, as it tells the others: what it waits for, and where it is otherwise.

#![forbid(unsafe_code)]

use mpi_shim_abi::{ANY, Kind, PROC_NULL};

use crate::engine::pending::Waiting;

/// What a rank tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State {
    /// Operations that it has finished: who waits for ever finishes none.
    pub(super) done: u64,
    /// While an operation waits, it may begin something else that others wait for: it launches from
    /// several threads, say.
    pub(super) others: bool,
    pub(super) waits: Vec<Wait>,
    /// Messages that were started and have not ended. They go on while it waits for something.
    pub(super) background: Vec<Wait>,
    /// How far it is in comparing with other nodes, by communicator.
    pub(super) compared: Vec<Comparing>,
    /// How many collectives have begun, by communicator.
    pub(super) begun: Vec<(i64, u64)>,
    /// On communicators that are not among these none have.
    pub(super) all_begun: bool,
    /// Where the program is, in words.
    pub(super) place: String,
}

/// How far a rank is in comparing collectives with other nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Comparing {
    /// Operations, the one among them that is compared now.
    pub(super) executed: u64,
    /// Exchanges that have begun.
    pub(super) begun: u64,
    /// One of them has not ended.
    pub(super) waits: bool,
}

impl From<(u64, u64, bool)> for Comparing {
    fn from((executed, begun, waits): (u64, u64, bool)) -> Comparing {
        Comparing {
            executed,
            begun,
            waits,
        }
    }
}

/// An operation that has begun and not ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wait {
    pub(super) kind: Kind,
    /// Number of its communicator.
    pub(super) comm: i64,
    /// The ranks of the communicator in the world; none means all, in order.
    pub(super) members: Vec<i32>,
    /// Ranks in the world; [`ANY`], or [`PROC_NULL`] for none.
    pub(super) source: i32,
    pub(super) dest: i32,
    pub(super) send_tag: i32,
    pub(super) recv_tag: i32,
    pub(super) milliseconds: u64,
    /// A function of the user's may be running for it, so it may end by itself.
    pub(super) calls_user: bool,
    /// Of a collective, its place among those of its communicator, from 1; 0 if it is not known.
    pub(super) number: u64,
    /// It, in words.
    pub(super) words: String,
}

impl Wait {
    /// Of what waits.
    pub(super) fn new(waiting: Waiting) -> Wait {
        let op = &waiting.operation;
        let in_world = |rank: i32| match usize::try_from(rank) {
            Ok(place) if !waiting.members.is_empty() => {
                waiting.members.get(place).copied().unwrap_or(rank)
            }
            _ => rank,
        };
        let no = |used: bool, rank: i32| if used { in_world(rank) } else { PROC_NULL };
        Wait {
            kind: op.kind,
            comm: op.comm,
            members: waiting.members.to_vec(),
            source: no(op.kind.receives(), op.source),
            dest: no(op.kind.sends(), op.dest),
            send_tag: op.send_tag,
            recv_tag: op.recv_tag,
            milliseconds: waiting.time.as_millis() as u64,
            calls_user: waiting.calls_user,
            number: waiting.number,
            words: waiting.words,
        }
    }

    /// Whether that rank of the world is in its communicator.
    pub(super) fn has(&self, rank: i32) -> bool {
        self.members.is_empty() || self.members.contains(&rank)
    }

    /// Whether it may receive what `sender`, of rank `rank`, sends.
    pub(super) fn accepts(&self, rank: i32, sender: &Wait) -> bool {
        self.kind.receives()
            && self.comm == sender.comm
            && (self.source == ANY || self.source == rank)
            && (self.recv_tag == ANY || self.recv_tag == sender.send_tag)
    }
}

/// Between fields, and between operations: neither is in any text.
const FIELD: char = '\u{1f}';
const ROW: char = '\u{1e}';
/// Operations that are told, and the letters of one.
const MOST: usize = 8;
/// Messages in the background that are told.
pub(super) const MOST_BACKGROUND: usize = 32;
const LONGEST: usize = 300;

impl State {
    /// How many collectives have begun on the communicator of that number, if that is known.
    pub(super) fn begun_on(&self, comm: i64) -> Option<u64> {
        let row = self.begun.iter().find(|row| row.0 == comm);
        let none = self.all_begun.then_some(0);
        row.map(|row| row.1).or(none)
    }

    /// As text.
    pub(super) fn encode(&self) -> String {
        let clean = |text: &str, longest: usize| -> String {
            let letters = text
                .chars()
                .filter(|&letter| letter != FIELD && letter != ROW);
            letters.take(longest).collect()
        };
        let waits = self.waits.iter().take(MOST);
        let background = self.background.iter().take(MOST_BACKGROUND);
        let (done, others, count) = (self.done, self.others, waits.len());
        let mut text = format!("{done}{FIELD}{others}{FIELD}{count}");
        for one in &self.compared {
            let waits = u8::from(one.waits);
            text += &format!("{FIELD}{},{},{waits}", one.executed, one.begun);
        }
        text.push(ROW);
        text += if self.all_begun { "all" } else { "some" };
        for (comm, count) in &self.begun {
            text += &format!("{FIELD}{comm},{count}");
        }
        for wait in waits.chain(background) {
            let members: Vec<String> = wait.members.iter().map(i32::to_string).collect();
            let numbers = [
                wait.kind as i64,
                wait.comm,
                wait.source.into(),
                wait.dest.into(),
                wait.send_tag.into(),
                wait.recv_tag.into(),
                wait.milliseconds as i64,
                wait.calls_user.into(),
                wait.number as i64,
            ];
            text.push(ROW);
            for number in numbers {
                text += &format!("{number}{FIELD}");
            }
            text += &format!(
                "{}{FIELD}{}",
                members.join(","),
                clean(&wait.words, LONGEST)
            );
        }
        // Last, since it may be cut off.
        text + &format!("{ROW}{}", clean(&self.place, usize::MAX))
    }

    /// From text; none if it is not whole.
    pub(super) fn decode(text: &str) -> Option<State> {
        let mut rows: Vec<&str> = text.split(ROW).collect();
        let place = (rows.len() > 1).then(|| rows.pop())??.to_owned();
        let mut fields = rows.first()?.split(FIELD);
        let (done, others) = (fields.next()?, fields.next()?);
        let count: usize = fields.next()?.parse().ok()?;
        let (all, begun) = begun(rows.get(1)?)?;
        let mut waits: Vec<Wait> = rows[2..]
            .iter()
            .map(|row| wait(row))
            .collect::<Option<_>>()?;
        let background = waits.split_off(count.min(waits.len()));
        Some(State {
            done: done.parse().ok()?,
            others: others.parse().ok()?,
            waits,
            background,
            compared: fields.map(compared).collect::<Option<_>>()?,
            begun,
            all_begun: all,
            place,
        })
    }
}

fn compared(field: &str) -> Option<Comparing> {
    let mut numbers = field.split(',').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()? != 0).into())
}

fn begun(row: &str) -> Option<(bool, Vec<(i64, u64)>)> {
    let mut fields = row.split(FIELD);
    let all = fields.next()? == "all";
    let one = |field: &str| {
        let (comm, count) = field.split_once(',')?;
        Some((comm.parse().ok()?, count.parse().ok()?))
    };
    Some((all, fields.map(one).collect::<Option<_>>()?))
}

fn wait(row: &str) -> Option<Wait> {
    let fields: Vec<&str> = row.split(FIELD).collect();
    let [numbers @ .., members, words] = &fields[..] else {
        return None;
    };
    let numbers: Vec<i64> = numbers
        .iter()
        .map(|number| number.parse().ok())
        .collect::<Option<_>>()?;
    let [
        kind,
        comm,
        source,
        dest,
        send_tag,
        recv_tag,
        milliseconds,
        calls_user,
        number,
    ] = numbers[..]
    else {
        return None;
    };
    let members = members.split(',').filter(|member| !member.is_empty());
    Some(Wait {
        kind: *Kind::ALL.get(usize::try_from(kind).ok()?)?,
        comm,
        members: members
            .map(|member| member.parse().ok())
            .collect::<Option<_>>()?,
        source: source.try_into().ok()?,
        dest: dest.try_into().ok()?,
        send_tag: send_tag.try_into().ok()?,
        recv_tag: recv_tag.try_into().ok()?,
        milliseconds: milliseconds.try_into().ok()?,
        calls_user: calls_user != 0,
        number: number as u64,
        words: (*words).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_is_heard() {
        let wait = Wait {
            kind: Kind::Sendrecv,
            comm: 1 << 61,
            members: vec![3, 0, 2],
            source: ANY,
            dest: PROC_NULL,
            send_tag: 7,
            recv_tag: ANY,
            milliseconds: 12345,
            calls_user: false,
            number: 7,
            words: "sendrecv of float32[3]".into(),
        };
        let barrier = Wait {
            kind: Kind::Barrier,
            members: Vec::new(),
            calls_user: true,
            ..wait.clone()
        };
        let state = State {
            done: 9,
            others: true,
            waits: vec![wait.clone(), barrier],
            background: vec![wait],
            compared: vec![(7, 3, true).into(), (0, 0, false).into()],
            begun: vec![(1 << 60, 12), (1, 3)],
            all_begun: true,
            place: "in Python\nat train.py:3".into(),
        };
        assert_eq!(State::decode(&state.encode()), Some(state));
        let empty = State::default();
        assert_eq!(State::decode(&empty.encode()), Some(empty));
        for garbage in ["", "x", "1\u{1f}true", "1\u{1f}true\u{1e}3\u{1e}x"] {
            assert_eq!(State::decode(garbage), None);
        }
    }
}
