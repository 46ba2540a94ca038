//! Timelines as XLA's profilers write them: events in, a serialized `tensorflow.profiler.XSpace`
//! out (`tsl/profiler/protobuf/xplane.proto` in XLA).
//!
//! Nothing here knows PJRT, MPI or an operation.

#![forbid(unsafe_code)]

mod proto {
    #![allow(missing_docs, clippy::all, unused)]
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}

use std::collections::HashMap;

use proto::xplane::{
    ProfileOptions, XEvent, XEventMetadata, XLine, XPlane, XSpace, XStat, XStatMetadata, xstat,
};
use protobuf::Message;

/// The plane whose lines every reader shows among the threads of the process: whoever collects a
/// profile puts them into `/host:CPU` (`MergeHostPlanesAndSortLines` in
/// `xla/tsl/profiler/convert/post_process_single_host_xplane.cc`).
pub const HOST_PLANE: &str = "/host:TPU-runtime";

/// Events that are written at once, and then leave the memory.
const PIECE: usize = 8192;

/// A value of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Number(i64),
    /// A text, of which there are few.
    Text(String),
}

/// An event of a line.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// Name.
    pub name: &'a str,
    /// Begin, in nanoseconds since 1970.
    pub start: u64,
    /// End, in nanoseconds since 1970.
    pub end: u64,
    /// What is said of it.
    pub stats: Vec<(&'static str, Value)>,
}

/// Writes a plane. An `XSpace` after another in one buffer is both together (Protocol Buffers,
/// encoding, "Last One Wins"), and planes of one name are one to readers, so a plane is written in
/// pieces.
pub struct PlaneWriter {
    plane: &'static str,
    /// From which all events count.
    start: u64,
    /// Names by line.
    lines: Vec<(i64, String)>,
    piece: HashMap<usize, Vec<XEvent>>,
    in_piece: usize,
    names: HashMap<String, i64>,
    stats: HashMap<String, i64>,
    bytes: Vec<u8>,
}

impl PlaneWriter {
    /// A plane of events after `start`, in nanoseconds since 1970.
    pub fn new(plane: &'static str, start: u64) -> PlaneWriter {
        PlaneWriter {
            plane,
            start,
            lines: Vec::new(),
            piece: HashMap::new(),
            in_piece: 0,
            names: HashMap::new(),
            stats: HashMap::new(),
            bytes: Vec::new(),
        }
    }

    /// A line of that number and name. Returns what stands for it in [`PlaneWriter::event`].
    pub fn line(&mut self, id: i64, name: String) -> usize {
        self.lines.push((id, name));
        self.lines.len() - 1
    }

    /// Adds an event to a line. Events of a line are within each other or apart.
    pub fn event(&mut self, line: usize, event: Event<'_>) {
        let names = self.names.len() as i64 + 1;
        let metadata_id = *self.names.entry(event.name.to_owned()).or_insert(names);
        let mut stats = Vec::with_capacity(event.stats.len());
        for (name, value) in event.stats {
            let value = match value {
                Value::Number(number) => xstat::Value::Int64Value(number),
                Value::Text(text) => xstat::Value::RefValue(self.stat(text) as u64),
            };
            stats.push(XStat {
                metadata_id: self.stat(name.to_owned()),
                value: Some(value),
                ..XStat::default()
            });
        }
        let picoseconds = |from: u64, to: u64| to.saturating_sub(from) as i64 * 1000;
        self.piece.entry(line).or_default().push(XEvent {
            metadata_id,
            offset_ps: picoseconds(self.start, event.start),
            duration_ps: picoseconds(event.start, event.end),
            stats,
            ..XEvent::default()
        });
        self.in_piece += 1;
        if self.in_piece == PIECE {
            self.write();
        }
    }

    /// The serialized space, with warnings that readers show.
    ///
    /// # Errors
    /// If it cannot be serialized.
    pub fn finish(mut self, warnings: Vec<String>) -> protobuf::Result<Vec<u8>> {
        self.write();
        let space = XSpace {
            warnings,
            ..XSpace::default()
        };
        space.write_to_vec(&mut self.bytes)?;
        Ok(self.bytes)
    }

    fn stat(&mut self, name: String) -> i64 {
        let next = self.stats.len() as i64 + 1;
        *self.stats.entry(name).or_insert(next)
    }

    fn write(&mut self) {
        self.in_piece = 0;
        let mut plane = XPlane {
            name: self.plane.to_owned(),
            ..XPlane::default()
        };
        for (name, &id) in &self.names {
            let name = name.clone();
            let metadata = XEventMetadata {
                id,
                name,
                ..XEventMetadata::default()
            };
            plane.event_metadata.insert(id, metadata);
        }
        for (name, &id) in &self.stats {
            let name = name.clone();
            let metadata = XStatMetadata {
                id,
                name,
                ..XStatMetadata::default()
            };
            plane.stat_metadata.insert(id, metadata);
        }
        for (line, events) in self.piece.drain() {
            let (id, name) = self.lines[line].clone();
            plane.lines.push(XLine {
                id,
                name,
                timestamp_ns: self.start as i64,
                events,
                ..XLine::default()
            });
        }
        let space = XSpace {
            planes: vec![plane],
            ..XSpace::default()
        };
        // What is in memory is whole, and a vector has room.
        if !space.planes[0].lines.is_empty() {
            let _ = space.write_to_vec(&mut self.bytes);
        }
    }
}

/// Whether serialized `tensorflow.ProfileOptions` ask for events of the host. Unknown options ask
/// for all.
pub fn wants_host_events(options: &[u8]) -> bool {
    // Before version 1 the level says nothing (profiler_options.proto).
    ProfileOptions::parse_from_bytes(options)
        .map_or(true, |read| read.version == 0 || read.host_tracer_level > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(bytes: &[u8]) -> XSpace {
        XSpace::parse_from_bytes(bytes).unwrap()
    }

    #[test]
    fn events_are_in_their_lines_with_what_is_said_of_them() {
        let mut plane = PlaneWriter::new(HOST_PLANE, 1000);
        let (first, second) = (plane.line(7, "one".into()), plane.line(8, "two".into()));
        for (line, start) in [(first, 1000), (second, 1500), (first, 2000)] {
            plane.event(
                line,
                Event {
                    name: "allreduce",
                    start,
                    end: start + 10,
                    stats: vec![
                        ("bytes", Value::Number(8)),
                        ("dtype", Value::Text("float32".into())),
                    ],
                },
            );
        }
        let space = parsed(&plane.finish(vec!["a warning".into()]).unwrap());
        assert_eq!(space.warnings, ["a warning"]);
        let [plane] = &space.planes[..] else {
            panic!("{space:?}")
        };
        assert_eq!((plane.name.as_str(), plane.lines.len()), (HOST_PLANE, 2));
        let line = plane.lines.iter().find(|line| line.id == 7).unwrap();
        assert_eq!((line.timestamp_ns, line.events.len()), (1000, 2));
        let event = &line.events[1];
        assert_eq!((event.offset_ps, event.duration_ps), (1_000_000, 10_000));
        assert_eq!(plane.event_metadata[&event.metadata_id].name, "allreduce");
        let name = |id: i64| plane.stat_metadata[&id].name.as_str();
        let [bytes, dtype] = &event.stats[..] else {
            panic!("{event:?}")
        };
        assert_eq!((name(bytes.metadata_id), bytes.int64_value()), ("bytes", 8));
        assert_eq!(name(dtype.metadata_id), "dtype");
        assert_eq!(name(dtype.ref_value() as i64), "float32");
    }

    #[test]
    fn many_events_are_in_pieces_that_are_one_space() {
        let mut plane = PlaneWriter::new(HOST_PLANE, 0);
        let line = plane.line(1, "one".into());
        for start in 0..2 * PIECE as u64 + 5 {
            let (name, stats) = ("event", Vec::new());
            let end = start + 1;
            plane.event(
                line,
                Event {
                    name,
                    start,
                    end,
                    stats,
                },
            );
        }
        let space = parsed(&plane.finish(Vec::new()).unwrap());
        assert_eq!(space.planes.len(), 3);
        let lines = space.planes.iter().flat_map(|plane| &plane.lines);
        assert!(lines.clone().all(|line| line.id == 1 && line.name == "one"));
        assert_eq!(
            lines.map(|line| line.events.len()).sum::<usize>(),
            2 * PIECE + 5
        );
    }

    #[test]
    fn no_events_are_no_plane() {
        let plane = PlaneWriter::new(HOST_PLANE, 0);
        assert_eq!(parsed(&plane.finish(Vec::new()).unwrap()).planes.len(), 0);
    }

    #[test]
    fn the_level_of_the_host_decides() {
        let options = |version, host_tracer_level| {
            let options = ProfileOptions {
                version,
                host_tracer_level,
                ..ProfileOptions::default()
            };
            options.write_to_bytes().unwrap()
        };
        assert!(wants_host_events(&options(1, 2)));
        assert!(!wants_host_events(&options(1, 0)));
        assert!(wants_host_events(&options(0, 0)));
        assert!(wants_host_events(b"\xff\xff no options"));
    }
}
