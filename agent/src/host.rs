//! What all workers of one agent share.
//!
//! Invariant: nothing here is owned by one node or proxy; that is in its worker.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use crate::{
    artifact::{Engines, catalogue::Catalogue},
    controllers::Controllers,
    journal::Journal,
    lease::Lease,
    metrics::Metrics,
    reports::Reports,
    settings::ProxyTls,
};

/// One machine, as its agent sees it.
#[derive(Debug)]
pub struct Host {
    pub host_id: String,
    pub advertise_ip: IpAddr,
    pub nodes_dir: PathBuf,
    /// Files of lost writes.
    pub lost_dir: PathBuf,
    pub proxies_dir: PathBuf,
    pub proxy_binary: PathBuf,
    /// How its proxies speak TLS.
    pub proxy_tls: Option<ProxyTls>,
    pub engines: Engines,
    /// Programs of the mesh that are here.
    pub catalogue: Arc<Catalogue>,
    pub journal: Journal,
    pub lease: Lease,
    pub reports: Reports,
    pub controllers: Controllers,
    pub metrics: Arc<Metrics>,
}

/// Ids name directories, so they are plain words.
pub fn is_id(id: &str) -> bool {
    const ID_BYTES_MAX: usize = 64;
    !id.is_empty()
        && id.len() <= ID_BYTES_MAX
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}
