//! The record layer behind the handshake: cuts what comes into records and opens them, seals what goes.
//!
//! Invariants: what is opened lies at the front of the buffer that it came in, nothing is copied
//! elsewhere; a record that is not whole is kept as it came; after an error nothing more is opened.

use super::secrets::{ALERT, Broken, DATA, Direction, HANDSHAKE, HEADER, PLAIN_MAX, SEALED_MAX};
use super::socket::PIECE;

/// A client that asks for new keys and does not take the answers is closed before more than this waits
/// for it: the piece of a reply that its socket did not take, which is no fault of its, and as much again.
const ANSWERS_MAX: usize = 2 * PIECE;
/// New keys of a client in a row. A library changes its key after gigabytes; each change costs as much as
/// a thousand bytes of requests, so more of them without a byte of content are an attack.
const UPDATES_MAX: u32 = 32;

const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;
const WARNING: u8 = 1;
const FATAL: u8 = 2;
const KEY_UPDATE: u8 = 24;

/// What came of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened {
    /// Bytes of content, at the front of the buffer.
    pub(super) bytes: usize,
    /// The client said that it sends nothing more.
    pub(super) ended: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) rx: Direction,
    pub(super) tx: Direction,
    /// The beginning of a record.
    pub(super) partial: Vec<u8>,
    /// New keys of the client since its last content. Another process begins to count anew.
    updates: u32,
}

impl Broken {
    /// What the client is told (RFC 8446 6). `None`: nothing.
    fn alert(self) -> Option<u8> {
        match self {
            Self::OutOfPlace => Some(10),
            Self::Forged => Some(20),
            Self::Large => Some(22),
            Self::Malformed => Some(50),
            Self::Restless => Some(90),
            Self::Alert(_) => None,
        }
    }
}

/// Length of the record that begins here, with its header. `None`: the header is not whole.
///
/// # Errors
/// It is no record, or larger than one.
pub(super) fn record_len(bytes: &[u8], max: usize) -> Result<Option<usize>, Broken> {
    let [kind, major, _, high, low, ..] = *bytes else {
        return Ok(None);
    };
    if !(20..=23).contains(&kind) || major != 3 {
        return Err(Broken::Malformed);
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > max {
        return Err(Broken::Large);
    }
    Ok(Some(HEADER + len))
}

impl Records {
    pub(super) fn new(rx: Direction, tx: Direction) -> Self {
        Self {
            rx,
            tx,
            partial: Vec::new(),
            updates: 0,
        }
    }

    /// Opens what is whole of `bytes`, which begins with what was kept; answers go to `out`.
    ///
    /// # Errors
    /// What came is not of this session. The alert is in `out`.
    pub(super) fn open(&mut self, bytes: &mut [u8], out: &mut Vec<u8>) -> Result<Opened, Broken> {
        let opened = self.open_all(bytes, out);
        if let Err(error) = opened
            && let Some(alert) = error.alert()
        {
            // The session is over either way.
            let _ = self.tx.seal(ALERT, &[FATAL, alert], out);
        }
        opened
    }

    fn open_all(&mut self, bytes: &mut [u8], out: &mut Vec<u8>) -> Result<Opened, Broken> {
        let (mut read, mut written) = (0, 0);
        while let Some(len) = record_len(&bytes[read..], SEALED_MAX)? {
            if bytes.len() - read < len {
                break;
            }
            let record = &mut bytes[read..read + len];
            let (kind, content) = self.rx.open(record)?;
            match kind {
                DATA => {
                    self.updates = 0;
                    let count = content.len();
                    bytes.copy_within(read + content.start..read + content.end, written);
                    written += count;
                }
                ALERT => {
                    if self.heed_alert(&record[content])? {
                        return Ok(Opened {
                            bytes: written,
                            ended: true,
                        });
                    }
                }
                HANDSHAKE => self.heed_handshake(&record[content], out)?,
                _ => return Err(Broken::OutOfPlace),
            }
            read += len;
        }
        self.partial.clear();
        self.partial.extend_from_slice(&bytes[read..]);
        if self.partial.is_empty() {
            self.partial = Vec::new(); // who is idle has no buffer
        }
        Ok(Opened {
            bytes: written,
            ended: false,
        })
    }

    /// True if the client sends nothing more.
    fn heed_alert(&self, alert: &[u8]) -> Result<bool, Broken> {
        match *alert {
            [_, CLOSE_NOTIFY] => Ok(true),
            [_, USER_CANCELED] => Ok(false),
            [WARNING, _] if !self.rx.suite().is_13() => Ok(false),
            [_, alert] => Err(Broken::Alert(alert)),
            _ => Err(Broken::Malformed),
        }
    }

    /// A new key of the client. Nothing else is in place behind the handshake: no other certificate is
    /// asked for, and a TLS 1.2 session is not negotiated anew.
    fn heed_handshake(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        let &[KEY_UPDATE, 0, 0, 1, wants_ours @ (0 | 1)] = message else {
            return Err(Broken::OutOfPlace);
        };
        self.updates += 1;
        if self.updates > UPDATES_MAX {
            return Err(Broken::Restless);
        }
        if !self.rx.change_key() {
            return Err(Broken::OutOfPlace);
        }
        if wants_ours == 1 {
            if out.len() > ANSWERS_MAX {
                return Err(Broken::Restless);
            }
            self.change_own_key(out)?;
        }
        Ok(())
    }

    fn change_own_key(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        self.tx.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
        match self.tx.change_key() {
            true => Ok(()),
            false => Err(Broken::OutOfPlace),
        }
    }

    /// Appends these bytes as records.
    ///
    /// # Errors
    /// The session has sealed all that it may.
    pub(super) fn seal(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        for part in bytes.chunks(PLAIN_MAX) {
            if self.tx.is_worn() {
                self.change_own_key(out)?;
            }
            self.tx.seal(DATA, part, out)?;
        }
        Ok(())
    }

    /// Appends the last word.
    pub(super) fn seal_end(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        self.tx.seal(ALERT, &[WARNING, CLOSE_NOTIFY], out)
    }
}
