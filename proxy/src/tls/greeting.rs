//! The handshake, made by rustls.
//!
//! Invariants: rustls is given whole records only, and none behind the last one of the handshake, so
//! that nothing of the session is inside it when its secrets are taken out; a handshake is bounded in
//! bytes and in time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::{ConnectionTrafficSecrets, KeyLog, ServerConnection};
use zeroize::Zeroizing;

use super::Port;
use super::records::{Records, record_len};
use super::secrets::{Broken, Direction, SEALED_MAX, Suite};

/// A client has as long for its handshake, from its first byte on. A round trip or two, and on a slow
/// network some more.
pub(crate) const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// What a client sends in a handshake, at most. It has no certificate to show: two records of some
/// hundred bytes, or a few more with keys that are safe from quantum computers.
const GREETING_BYTES_MAX: usize = 64 * 1024;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("the handshake is longer than any")]
    Long,
    #[error("the session cannot be carried on")]
    Unknown,
}

/// The secrets of a TLS 1.3 session, as rustls says them: those of the client and of the server. What
/// else it lets out is only keys, from which no later keys follow.
#[derive(Default)]
struct Caught(Mutex<[Zeroizing<Vec<u8>>; 2]>);

impl std::fmt::Debug for Caught {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Caught(..)")
    }
}

const LABELS: [&str; 2] = ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"];

impl KeyLog for Caught {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut caught = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = LABELS.iter().position(|known| *known == label) {
            caught[at] = Zeroizing::new(secret.to_vec());
        }
    }

    fn will_log(&self, label: &str) -> bool {
        LABELS.contains(&label)
    }
}

/// See the module.
pub(super) struct Greeting {
    connection: ServerConnection,
    caught: Arc<Caught>,
    /// The beginning of a record.
    pub(super) partial: Vec<u8>,
    /// So many came.
    bytes: usize,
}

impl std::fmt::Debug for Greeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Greeting").finish_non_exhaustive()
    }
}

impl Greeting {
    pub(super) fn new(port: &Port) -> Result<Self, rustls::Error> {
        let caught = Arc::new(Caught::default());
        let mut config = port.config.clone(); // some pointers
        config.key_log = Arc::clone(&caught) as Arc<dyn KeyLog>;
        Ok(Self {
            connection: ServerConnection::new(Arc::new(config))?,
            caught,
            partial: Vec::new(),
            bytes: 0,
        })
    }

    /// Takes what came, which begins with what was kept; answers go to `out`. True once the session is
    /// there, and how much of the bytes was of the handshake. What is not whole is kept otherwise.
    ///
    /// # Errors
    /// There will be none; what the client is told of it is in `out`.
    pub(super) fn hear(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(bool, usize), Failed> {
        let mut read = 0;
        while let Some(len) = record_len(&bytes[read..], SEALED_MAX)? {
            let Some(mut record) = bytes.get(read..read + len) else {
                break;
            };
            self.bytes += len;
            if self.bytes > GREETING_BYTES_MAX {
                return Err(Failed::Long);
            }
            while !record.is_empty() {
                // Of a slice; what it does not take is its error below.
                if self.connection.read_tls(&mut record).unwrap_or(0) == 0 {
                    return Err(Failed::Long);
                }
            }
            let heard = self.connection.process_new_packets();
            while self.connection.wants_write() {
                if self.connection.write_tls(out).unwrap_or(0) == 0 {
                    break;
                }
            }
            if heard?.peer_has_closed() {
                return Err(Failed::Broken(Broken::Alert(0)));
            }
            read += len;
            if !self.connection.is_handshaking() {
                return Ok((true, read));
            }
        }
        self.partial.clear();
        self.partial.extend_from_slice(&bytes[read..]);
        Ok((false, bytes.len()))
    }

    /// The session behind the handshake.
    ///
    /// # Errors
    /// It is not at its end, or agreed on what nobody offered.
    pub(super) fn session(self) -> Result<Records, Failed> {
        let suite = self.connection.negotiated_cipher_suite();
        let suite = suite.map(|suite| u16::from(suite.suite()));
        let suite = suite.and_then(Suite::of).ok_or(Failed::Unknown)?;
        let secrets = self.connection.dangerous_extract_secrets()?;
        let mut caught = self.caught.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [of_client, of_server] = std::mem::take(&mut *caught);
        let (rx, tx) = match suite.is_13() {
            true => (of_client, of_server),
            false => (plain(&secrets.rx.1)?, plain(&secrets.tx.1)?),
        };
        let rx = Direction::new(suite, rx, secrets.rx.0).ok_or(Failed::Unknown)?;
        let tx = Direction::new(suite, tx, secrets.tx.0).ok_or(Failed::Unknown)?;
        Ok(Records::new(rx, tx))
    }
}

/// Key and nonce of a TLS 1.2 session.
fn plain(secrets: &ConnectionTrafficSecrets) -> Result<Zeroizing<Vec<u8>>, Failed> {
    use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
    match secrets {
        Aes128Gcm { key, iv } | Aes256Gcm { key, iv } | Chacha20Poly1305 { key, iv } => {
            Ok(Zeroizing::new([key.as_ref(), iv.as_ref()].concat()))
        }
        _ => Err(Failed::Unknown),
    }
}
