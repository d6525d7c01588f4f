//! What `slotmesh up --output json` prints first: a contract with scripts, field by field.

use serde::{Deserialize, Serialize};
use slotmesh_proto::instance::v1 as instance;

use crate::{render::Text, views};

/// A mesh that serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contract {
    /// Where the gRPC API is.
    pub controller: String,
    /// At each controller, when there are several.
    #[serde(default, skip_serializing_if = "is_one")]
    pub controllers: Vec<String>,
    /// Where Redis clients connect.
    pub proxies: Vec<String>,
    pub instance: String,
    pub pids: Pids,
    pub nodes: Vec<NodeEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pids {
    pub controller: u32,
    #[serde(default, skip_serializing_if = "is_one")]
    pub controllers: Vec<u32>,
    pub agents: Vec<u32>,
    pub proxies: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    pub id: String,
    pub shard: String,
    pub role: String,
    pub addr: String,
    pub pid: u32,
    pub host: String,
}

/// What `controller` says already.
fn is_one<T>(controllers: &[T]) -> bool {
    controllers.len() <= 1
}

impl NodeEntry {
    /// A node as the API shows it.
    pub fn new(shard_id: &str, node: &instance::Node) -> Self {
        Self {
            id: node.node_id.clone(),
            shard: shard_id.to_owned(),
            role: views::role_name(node.current_role()),
            addr: node.address.clone(),
            pid: node.pid,
            host: node.host_id.clone(),
        }
    }
}

impl Contract {
    /// Pids of everything that is no child of `slotmesh up`: nodes and proxies.
    pub fn grandchildren(&self) -> impl Iterator<Item = u32> {
        self.nodes
            .iter()
            .map(|n| n.pid)
            .chain(self.pids.proxies.iter().copied())
            .filter(|p| *p != 0)
    }
}

impl Text for Contract {
    fn text(&self) -> String {
        let controller = match self.controllers.len() {
            0 | 1 => self.controller.clone(),
            _ => self.controllers.join(","),
        };
        let Self {
            proxies,
            instance,
            nodes,
            ..
        } = self;
        let mut shards: Vec<&str> = nodes.iter().map(|n| n.shard.as_str()).collect();
        shards.sort_unstable();
        shards.dedup();
        let port = |address: &String| address.rsplit(':').next().unwrap_or_default().to_owned();
        let endpoint = proxies.first().map(port).unwrap_or_default();
        let mut text = format!(
            "instance    {instance}: {} shards on {} nodes\nendpoints   {}\ncontroller  {controller}\n\ntry:\n  \
             redis-cli -p {endpoint} set greeting hello\n  \
             grpcurl -plaintext {controller} list\n  \
             slotmesh --controller {controller} instance describe {instance}",
            shards.len(),
            nodes.len(),
            proxies.join("  "),
        );
        if let Some(replica) = nodes.iter().find(|n| n.role == "replica") {
            text.push_str(&format!(
                "\n  slotmesh --controller {controller} switchover {instance} --target {} --wait",
                replica.id
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn contract() -> Contract {
        let node = |id: &str, role: &str, pid| NodeEntry {
            id: id.into(),
            shard: "s-0".into(),
            role: role.into(),
            addr: "127.0.0.1:4".into(),
            pid,
            host: "host-1".into(),
        };
        Contract {
            controller: "127.0.0.1:1".into(),
            controllers: vec!["127.0.0.1:1".into()],
            proxies: vec!["127.0.0.1:2".into(), "127.0.0.1:3".into()],
            instance: "r-1".into(),
            pids: Pids {
                controller: 10,
                controllers: vec![10],
                agents: vec![11],
                proxies: vec![12, 13],
            },
            nodes: vec![node("n-1", "primary", 14), node("n-2", "replica", 15)],
        }
    }

    #[test]
    fn the_first_line_has_the_fields_that_scripts_read() {
        let line = serde_json::to_string(&contract()).unwrap();
        expect![[r#"{"controller":"127.0.0.1:1","proxies":["127.0.0.1:2","127.0.0.1:3"],"instance":"r-1","pids":{"controller":10,"agents":[11],"proxies":[12,13]},"nodes":[{"id":"n-1","shard":"s-0","role":"primary","addr":"127.0.0.1:4","pid":14,"host":"host-1"},{"id":"n-2","shard":"s-0","role":"replica","addr":"127.0.0.1:4","pid":15,"host":"host-1"}]}"#]]
        .assert_eq(&line);
    }

    #[test]
    fn the_text_says_what_to_try() {
        expect![[r"
            instance    r-1: 1 shards on 2 nodes
            endpoints   127.0.0.1:2  127.0.0.1:3
            controller  127.0.0.1:1

            try:
              redis-cli -p 2 set greeting hello
              grpcurl -plaintext 127.0.0.1:1 list
              slotmesh --controller 127.0.0.1:1 instance describe r-1
              slotmesh --controller 127.0.0.1:1 switchover r-1 --target n-2 --wait"]]
        .assert_eq(&contract().text());
    }
}
