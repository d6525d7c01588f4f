//! Clients with TLS: a certificate, and a tunnel that gives any other client here one session of its own
//! for each of its connections.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedCipherSuite, SupportedProtocolVersion};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// A certificate for this machine that has signed itself, and its key.
#[derive(Clone)]
pub(crate) struct Certificate {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Certificate {
    pub(crate) fn make(dir: &Path) -> Self {
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
            .args(["-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-subj", "/CN=slotmesh-test"])
            .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-out".as_ref(), cert.as_os_str()])
            .args(["-keyout".as_ref(), key.as_os_str()])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        Self { cert, key }
    }

    /// What a proxy is told of it.
    pub(crate) fn flags(&self) -> [&str; 4] {
        let [cert, key] = [&self.cert, &self.key].map(|path| path.to_str().unwrap());
        ["--tls-cert", cert, "--tls-key", key]
    }

    /// For a client that trusts it and speaks only this.
    pub(crate) fn config(
        &self,
        version: &'static SupportedProtocolVersion,
        suite: Option<SupportedCipherSuite>,
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        let cert = CertificateDer::from_pem_file(&self.cert).unwrap();
        roots.add(cert).unwrap();
        let mut provider = ring::default_provider();
        if let Some(suite) = suite {
            provider.cipher_suites = vec![suite];
        }
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }
}

/// Where clients connect that are to reach `proxy` by TLS. A session that ends is not begun anew.
pub(crate) async fn tunnel(proxy: SocketAddr, config: Arc<ClientConfig>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connector = TlsConnector::from(config);
    tokio::spawn(async move {
        while let Ok((mut plain, _)) = listener.accept().await {
            plain.set_nodelay(true).unwrap();
            let connector = connector.clone();
            tokio::spawn(async move {
                let socket = TcpStream::connect(proxy).await.unwrap();
                socket.set_nodelay(true).unwrap();
                let name = ServerName::from(proxy.ip());
                let Ok(mut tls) = connector.connect(name, socket).await else {
                    return; // whoever is behind it is closed
                };
                // Its error is the test's: a connection that is closed.
                let _ = tokio::io::copy_bidirectional(&mut plain, &mut tls).await;
            });
        }
    });
    address
}
