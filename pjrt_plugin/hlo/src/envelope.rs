//! Serialized programs for several devices.

use protobuf::Message;

use crate::error::Refused;
use crate::proto::envelope::Envelope as Proto;

/// "mpi_cud" and the version of the message.
const MAGIC: u64 = u64::from_be_bytes(*b"mpi_cud1");

/// A program for several devices, as every rank can load it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The optimized program, before rewriting.
    pub optimized: Vec<u8>,
    /// The options that it was compiled with.
    pub options: Vec<u8>,
    /// It calls back into the host.
    pub callbacks: bool,
}

impl Envelope {
    /// Serializes it.
    ///
    /// # Errors
    /// If it is too large for one message.
    pub fn write(self) -> Result<Vec<u8>, Refused> {
        let proto = Proto {
            magic: MAGIC,
            optimized: self.optimized,
            compile_options: self.options,
            callbacks: self.callbacks,
            ..Default::default()
        };
        Ok(proto.write_to_bytes()?)
    }

    /// Reads a serialized one; none if the bytes are something else.
    ///
    /// # Errors
    /// If the bytes begin like one and are none.
    pub fn read(bytes: &[u8]) -> Result<Option<Envelope>, Refused> {
        // Field 1, fixed 64 bits, comes first.
        const TAG: u8 = 1 << 3 | 1;
        let begins = bytes.first() == Some(&TAG) && bytes.get(1..9) == Some(&MAGIC.to_le_bytes());
        if !begins {
            return Ok(None);
        }
        let proto = Proto::parse_from_bytes(bytes)?;
        Ok(Some(Envelope {
            optimized: proto.optimized,
            options: proto.compile_options,
            callbacks: proto.callbacks,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let envelope = Envelope {
            optimized: vec![1, 2, 3],
            options: vec![4],
            callbacks: true,
        };
        let bytes = envelope.clone().write().unwrap();
        assert_eq!(Envelope::read(&bytes).unwrap(), Some(envelope));
        for other in [&b""[..], b"ELF", &bytes[..5]] {
            assert_eq!(Envelope::read(other).unwrap(), None);
        }
        assert!(Envelope::read(&bytes[..bytes.len() - 3]).is_err());
    }
}
