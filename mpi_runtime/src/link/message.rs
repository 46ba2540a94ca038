//! What is said over a connection: a length, a letter for the kind, and numbers or a text.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::link::gone::Gone;

/// The longest message; whoever announces a longer one is a stranger.
const LONGEST: usize = 64 << 10;
/// Bytes of a text at most, so that its message is never too long.
const TEXT: usize = 48 << 10;

/// What waits for less than this is not told, nor a time that the hub can tell so well itself.
pub(super) const LONG: Duration = Duration::from_millis(500);

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The first of a rank that joins: it speaks for `ranks`, those of its node.
    Hello {
        cookie: u128,
        rank: u32,
        ranks: Vec<u32>,
    },
    /// The hub's answer.
    Welcome { cookie: u128 },
    /// The rank has heard that: from now on the end of this connection is its end.
    Ready,
    /// The process may end from now on, and that is no death.
    Bye,
    /// A rank does nothing any more.
    Gone { rank: u32, gone: Gone },
    /// A rank that was lost is there again.
    Found { rank: u32 },
    /// How long an operation of the node has waited; 0 if none waits for long.
    Waiting { milliseconds: u64 },
    /// The hub asks what the ranks do.
    Question { number: u64 },
    /// A rank's state, as the watch writes it.
    Answer {
        question: u64,
        rank: u32,
        state: String,
    },
    /// A rank wants JAX's coordinator.
    WantsCoordinator,
    /// Rank 0 has started it, on that port.
    Coordinator { port: u16 },
}

impl Message {
    /// An operation has waited for so long.
    pub(super) fn waiting(time: Duration) -> Message {
        let told = if time < LONG { Duration::ZERO } else { time };
        Message::Waiting {
            milliseconds: told.as_millis() as u64,
        }
    }

    pub(super) fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        let content = self.encode();
        let mut bytes = (content.len() as u32).to_le_bytes().to_vec();
        bytes.extend(content);
        // In one call, so that it is one packet.
        stream.write_all(&bytes)
    }

    pub(super) fn read(stream: &mut impl Read) -> io::Result<Message> {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(strange());
        }
        let mut content = vec![0; length];
        stream.read_exact(&mut content)?;
        Message::decode(&content).ok_or_else(strange)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Message::Hello {
                cookie,
                rank,
                ranks,
            } => {
                bytes.push(b'H');
                bytes.extend(cookie.to_le_bytes());
                bytes.extend(rank.to_le_bytes());
                bytes.extend(ranks.iter().flat_map(|rank| rank.to_le_bytes()));
            }
            Message::Welcome { cookie } => {
                bytes.push(b'W');
                bytes.extend(cookie.to_le_bytes());
            }
            Message::Ready => bytes.push(b'R'),
            Message::Bye => bytes.push(b'B'),
            Message::Gone { rank, gone } => {
                bytes.push(b'G');
                bytes.extend(rank.to_le_bytes());
                bytes.push(gone.number());
            }
            Message::Found { rank } => {
                bytes.push(b'F');
                bytes.extend(rank.to_le_bytes());
            }
            Message::Waiting { milliseconds } => {
                bytes.push(b'L');
                bytes.extend(milliseconds.to_le_bytes());
            }
            Message::Question { number } => {
                bytes.push(b'Q');
                bytes.extend(number.to_le_bytes());
            }
            Message::Answer {
                question,
                rank,
                state,
            } => {
                bytes.push(b'A');
                bytes.extend(question.to_le_bytes());
                bytes.extend(rank.to_le_bytes());
                bytes.extend(cut(state).bytes());
            }
            Message::WantsCoordinator => bytes.push(b'C'),
            Message::Coordinator { port } => {
                bytes.push(b'P');
                bytes.extend(port.to_le_bytes());
            }
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.split_first()?;
        let mut rest = Fields(rest);
        let message = match kind {
            b'H' => Message::Hello {
                cookie: u128::from_le_bytes(rest.take()?),
                rank: rest.u32()?,
                ranks: std::iter::from_fn(|| rest.u32()).collect(),
            },
            b'W' => Message::Welcome {
                cookie: u128::from_le_bytes(rest.take()?),
            },
            b'R' => Message::Ready,
            b'B' => Message::Bye,
            b'G' => Message::Gone {
                rank: rest.u32()?,
                gone: Gone::of(u8::from_le_bytes(rest.take()?))?,
            },
            b'F' => Message::Found { rank: rest.u32()? },
            b'L' => Message::Waiting {
                milliseconds: rest.u64()?,
            },
            b'Q' => Message::Question {
                number: rest.u64()?,
            },
            b'A' => Message::Answer {
                question: rest.u64()?,
                rank: rest.u32()?,
                state: String::from_utf8(std::mem::take(&mut rest.0).to_vec()).ok()?,
            },
            b'C' => Message::WantsCoordinator,
            b'P' => Message::Coordinator {
                port: u16::from_le_bytes(rest.take()?),
            },
            _ => return None,
        };
        rest.0.is_empty().then_some(message)
    }
}

/// The beginning of a text, of whole letters.
fn cut(text: &str) -> &str {
    let ends = (0..=TEXT.min(text.len())).rev();
    let whole = ends.into_iter().find_map(|end| text.get(..end));
    whole.unwrap_or_default()
}

/// What is left of a message.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const BYTES: usize>(&mut self) -> Option<[u8; BYTES]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

fn strange() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "this is no message of ours")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let state = "recv from rank 3 \u{1e}ü".to_owned();
        let all = [
            Message::Hello {
                cookie: 1 << 127 | 5,
                rank: 4,
                ranks: vec![4, 5, 9],
            },
            Message::Welcome { cookie: 7 },
            Message::Ready,
            Message::Bye,
            Message::Gone {
                rank: 3,
                gone: Gone::Died,
            },
            Message::Found { rank: 5 },
            Message::Waiting { milliseconds: 9 },
            Message::Question { number: 1 << 40 },
            Message::Answer {
                question: 2,
                rank: 1,
                state,
            },
            Message::WantsCoordinator,
            Message::Coordinator { port: 40_000 },
        ];
        let mut bytes = Vec::new();
        for message in &all {
            message.write(&mut bytes).unwrap();
        }
        let mut stream = &bytes[..];
        for message in all {
            assert_eq!(Message::read(&mut stream).unwrap(), message);
        }
        assert!(Message::read(&mut stream).is_err());
    }

    #[test]
    fn garbage_is_refused() {
        let long = ((LONGEST + 1) as u32).to_le_bytes();
        let http = *b"GET / HTTP/1.1\r\n\r\n";
        for bytes in [&long[..], &http, &[0; 4], &[1, 0, 0, 0, b'?']] {
            assert!(Message::read(&mut &*bytes).is_err());
        }
        for kind in b"HWGFLQAP" {
            assert_eq!(Message::decode(&[*kind]), None);
        }
        assert_eq!(Message::decode(b"R more"), None);
        assert_eq!(Message::decode(b"G\0\0\0\0\x09"), None);
    }

    #[test]
    fn a_long_text_is_cut_off() {
        let answer = Message::Answer {
            question: 1,
            rank: 2,
            state: "ü".repeat(LONGEST),
        };
        let mut bytes = Vec::new();
        answer.write(&mut bytes).unwrap();
        let Message::Answer { state, .. } = Message::read(&mut &bytes[..]).unwrap() else {
            panic!();
        };
        assert_eq!(state.len(), TEXT);
    }
}
