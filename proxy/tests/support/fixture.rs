//! Some nodes and a proxy that routes them from what it has saved.

use super::Proxy;
use super::node::{Node, snapshot};
use super::talk::Talk;

pub(crate) struct Fixture {
    pub(crate) nodes: Vec<Node>,
    pub(crate) proxy: Proxy,
    pub(crate) data: tempfile::TempDir,
}

/// So many shards of one node each, behind a proxy with so many workers.
pub(crate) async fn fixture(shards: u32, workers: u32) -> Fixture {
    fixture_with(shards, workers, &[]).await
}

/// As [`fixture`]; the proxy is told more.
pub(crate) async fn fixture_with(shards: u32, workers: u32, flags: &[&str]) -> Fixture {
    let nodes: Vec<Node> = (0..shards).map(|_| Node::start_with_epoch(1)).collect();
    let data = tempfile::tempdir().unwrap();
    let routes = (0..shards)
        .map(|i| nodes[i as usize].route(i, shards, 1))
        .collect();
    slotmesh_proxy::saved::save(data.path(), &snapshot(1, routes)).unwrap();
    let workers = workers.to_string();
    let flags = [&["--workers", &workers], flags].concat();
    let proxy = Proxy::start(data.path(), &flags).await;
    Fixture { nodes, proxy, data }
}

impl Fixture {
    pub(crate) async fn talk(&self) -> Talk {
        Talk::connect(self.proxy.address).await
    }
}
