//! What the tests of the whole proxy need: real redis-servers, a controller that says what a test
//! wants, and a proxy in this process. All are gone when dropped.
#![allow(dead_code)]

pub(crate) mod controller;
pub(crate) mod fixture;
pub(crate) mod handover;
pub(crate) mod node;
pub(crate) mod raw;
pub(crate) mod talk;
pub(crate) mod tls;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Parser as _;
use slotmesh_proxy::app::App;
use slotmesh_proxy::handover::TakeError;
use slotmesh_proxy::settings::{Flags, Settings};
use tokio_util::sync::CancellationToken;

/// Nothing that a test waits for takes longer, on the slowest machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A proxy in this process.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    stop: CancellationToken,
    pub(crate) task: tokio::task::JoinHandle<Result<(), TakeError>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Proxy {
    pub(crate) async fn start(data: &Path, arguments: &[&str]) -> Self {
        let data = data.to_str().unwrap();
        let fixed = [
            "slotmesh-proxy",
            "--proxy-id",
            "p1",
            "--instance",
            "i1",
            "--data",
            data,
        ];
        let flags = Flags::try_parse_from(fixed.iter().chain(arguments)).unwrap();
        let app = App::bind(Settings::load(flags).unwrap()).await.unwrap();
        let (address, admin) = (app.address(), app.admin_address());
        let stop = CancellationToken::new();
        let task = tokio::spawn(app.run(stop.clone()));
        Self {
            address,
            admin,
            stop,
            task,
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}

/// Waits until `ready` gives something; panics with what was waited for.
pub(crate) async fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
