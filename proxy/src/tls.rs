//! TLS towards clients: what the port needs for it, and what a connection has of it.
//!
//! Invariants: rustls makes the handshake and nothing else; from its end on all that a session is stands
//! in two secrets and two counters (`records`), so that another process can go on with it between any
//! two bytes; a client without TLS pays for one look at an `Option`.
//!
//! | file | its part |
//! |---|---|
//! | `secrets` | one direction of a session: seals or opens one record, and changes its key |
//! | `records` | the record layer behind the handshake: cuts, opens, seals, alerts |
//! | `greeting` | the handshake |
//! | `socket` | a client's socket with all of it |
//! | `told` | how a session is told to another process |

mod greeting;
mod records;
mod secrets;
mod socket;
#[cfg(test)]
mod tests;
mod told;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{ServerConfig, SupportedProtocolVersion, version};

pub(crate) use self::greeting::GREETING_LIMIT;
pub(crate) use self::socket::{Tls, write};
pub(crate) use self::told::SCHEMA;

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MinVersion {
    #[default]
    Tls12,
    Tls13,
}

/// What the settings say of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM: the certificate, then those between it and the root.
    pub cert: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    pub min_version: MinVersion,
    /// Clients without TLS are refused.
    pub required: bool,
}

/// Why no client could be served by TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {}, which must be a PEM file that this process may read: {why}", path.display())]
    File { path: PathBuf, why: String },
    #[error(
        "{} holds no certificate; name a PEM file with BEGIN CERTIFICATE in it (--tls-cert)",
        .0.display()
    )]
    NoCertificate(PathBuf),
    #[error(
        "the key {} is not the one of the certificate {}; name two that belong together",
        key.display(), cert.display()
    )]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error(
        "the certificate {} and the key {} cannot be used: {source}",
        cert.display(), key.display()
    )]
    Unusable {
        cert: PathBuf,
        key: PathBuf,
        source: rustls::Error,
    },
}

/// How a port speaks TLS.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    config: ServerConfig,
    required: bool,
}

impl Port {
    /// Reads the files.
    ///
    /// # Errors
    /// Nobody could connect with what they hold.
    pub(crate) fn load(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        let unreadable = |path: &Path, why: &dyn std::fmt::Display| TlsError::File {
            path: path.to_owned(),
            why: why.to_string(),
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&files.cert)
            .map_err(|error| unreadable(&files.cert, &error))?
            .collect();
        let chain = chain.map_err(|error| unreadable(&files.cert, &error))?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate(files.cert.clone()));
        }
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| unreadable(&files.key, &error))?;
        Self::build(chain, key, files)
    }

    fn build(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        files: &TlsFiles,
    ) -> Result<Arc<Self>, TlsError> {
        let (cert, key_path) = (files.cert.clone(), files.key.clone());
        let unusable = |source| match source {
            rustls::Error::InconsistentKeys(_) => TlsError::Mismatch {
                cert: cert.clone(),
                key: key_path.clone(),
            },
            source => TlsError::Unusable {
                cert: cert.clone(),
                key: key_path.clone(),
                source,
            },
        };
        let versions: &[&SupportedProtocolVersion] = match files.min_version {
            MinVersion::Tls12 => &[&version::TLS13, &version::TLS12],
            MinVersion::Tls13 => &[&version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(&unusable)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(&unusable)?;
        config.enable_secret_extraction = true;
        // Connections live for days, and a process that takes over could not read a ticket.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(Self {
            config,
            required: files.required,
        }))
    }
}
