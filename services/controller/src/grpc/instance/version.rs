//! What an instance runs, and what is listed that is newer.
//!
//! Invariant: what is shown of a node or proxy is what its process said of itself.

use slotmesh_proto::{instance::v1 as api, store::v1::ReleaseLevel};
use slotmesh_topology::{
    Shard,
    artifact::{Artifact, Product, Version, parse_reported},
    compatibility::{self, Engine},
    wire,
};
use tonic::Status;

use super::Instances;
use crate::grpc::artifact::{Artifacts, show};

impl Instances {
    pub(super) async fn versions(
        &self,
        instance_id: &str,
    ) -> Result<api::DescribeEngineVersionResponse, Status> {
        let (instance, _) = self.instance(instance_id)?;
        let listed = Artifacts::new(self.context.clone()).list().await?;
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let nodes = self.context.hub.read(|fleet| {
            let members = shards.iter().flat_map(|s| of_shard(&s.value));
            let seen = |(shard, node): (String, _)| {
                let version = fleet.node(node).map(|n| n.version.clone());
                (shard, node.to_string(), version.unwrap_or_default())
            };
            members.map(seen).collect::<Vec<_>>()
        });
        let running = self.context.hub.proxies();
        let proxies = instance.proxies.iter().map(|placed| {
            let id = placed.proxy.to_string();
            let seen = running.iter().find(|p| p.hello.proxy_id == id);
            let version = seen.map(|p| p.hello.version.clone());
            api::ProcessVersion {
                id,
                version: version.unwrap_or_default(),
                program: placed.program.clone(),
                ..api::ProcessVersion::default()
            }
        });
        let shown = describe(nodes, proxies.collect(), &listed);
        let latest = shown.latest.as_ref().map(|a| a.name.as_str());
        let (refused, upgrades) = self.upgrades(&instance, latest).await?;
        let (auto_upgrade_next, auto_upgrade_why) = self.next_auto_upgrade(&instance, &listed);
        let level = instance.auto_upgrade;
        let level = level.map_or(ReleaseLevel::Unspecified, wire::artifact::level_to);
        Ok(api::DescribeEngineVersionResponse {
            upgrade_possible: refused.is_empty(),
            upgrade_refused: refused,
            upgrades,
            auto_upgrade: level.into(),
            auto_upgrade_next,
            auto_upgrade_why,
            ..shown
        })
    }
}

fn of_shard(shard: &Shard) -> impl Iterator<Item = (String, &slotmesh_topology::NodeId)> {
    let members = shard.members.iter();
    members.map(|m| (shard.id.to_string(), &m.node))
}

fn describe(
    nodes: Vec<(String, String, String)>,
    proxies: Vec<api::ProcessVersion>,
    listed: &[Artifact],
) -> api::DescribeEngineVersionResponse {
    let engines = nodes.iter().filter_map(|(.., v)| parse_reported(v));
    let engines: Vec<Engine> = engines.collect();
    let lowest = engines.iter().min_by_key(|(_, version)| *version).copied();
    let of_proxies = proxies.iter().filter_map(|p| Version::parse(&p.version));
    let lowest_proxy = of_proxies.min();
    // A release that they may not be given hides none that they may.
    let may_be = |to| {
        engines
            .iter()
            .all(|e| compatibility::upgrade(*e, to).is_ok())
    };
    let latest = lowest.and_then(|(product, _)| newest(listed, product, may_be));
    let proxy_latest = newest(listed, Product::Proxy, |_| true);
    let is_latest = |lowest: Option<Version>, latest: Option<&Artifact>| {
        lowest.is_some_and(|lowest| latest.is_none_or(|latest| latest.version <= lowest))
    };
    api::DescribeEngineVersionResponse {
        engine: lowest.map_or("", |(product, _)| product.name()).to_owned(),
        major_version: lowest.map_or_else(String::new, |(_, v)| format!("{}.{}", v.major, v.minor)),
        minor_version: lowest.map_or_else(String::new, |(_, v)| v.to_string()),
        proxy_minor_version: lowest_proxy.map_or_else(String::new, |v| v.to_string()),
        is_latest_version: is_latest(lowest.map(|(_, v)| v), latest),
        is_proxy_latest_version: is_latest(lowest_proxy, proxy_latest),
        upgrade_possible: false,
        upgrade_refused: String::new(),
        upgrades: Vec::new(),
        auto_upgrade: ReleaseLevel::Unspecified.into(),
        auto_upgrade_next: String::new(),
        auto_upgrade_why: String::new(),
        latest: latest.map(show),
        proxy_latest: proxy_latest.map(show),
        nodes: nodes
            .into_iter()
            .map(|(shard_id, id, version)| api::ProcessVersion {
                id,
                shard_id,
                version,
                program: String::new(),
            })
            .collect(),
        proxies,
    }
}

fn newest(
    listed: &[Artifact],
    product: Product,
    may_be: impl Fn(Engine) -> bool,
) -> Option<&Artifact> {
    let of_product = listed.iter().filter(|a| a.product == product);
    let fit = of_product.filter(|a| may_be((a.product, a.version)));
    fit.max_by_key(|a| a.version)
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::artifact::{Level, SHA256_LENGTH};

    use super::*;

    fn listed(product: Product, version: &str) -> Artifact {
        Artifact {
            product,
            version: Version::parse(version).unwrap(),
            level: Level::High,
            release_note: "mends a crash".into(),
            sha256: [0; SHA256_LENGTH],
            source: "file:///opt/program".into(),
            created_unix_ms: 1,
        }
    }

    fn proxy(version: &str) -> api::ProcessVersion {
        api::ProcessVersion {
            id: "p".into(),
            version: version.into(),
            ..api::ProcessVersion::default()
        }
    }

    fn node(version: &str) -> (String, String, String) {
        ("s".into(), "n".into(), version.into())
    }

    #[test]
    fn the_lowest_node_counts_and_the_newest_of_its_own_engine() {
        let catalogue = [
            listed(Product::Redis, "7.0.9"),
            listed(Product::Redis, "7.0.15"),
            listed(Product::Valkey, "8.0.1"),
        ];
        let nodes = vec![node("7.0.15"), node("7.0.9"), node("")];
        let shown = describe(nodes, vec![proxy("0.1.0")], &catalogue);
        assert_eq!(
            (shown.engine.as_str(), shown.major_version.as_str()),
            ("redis", "7.0")
        );
        assert_eq!(shown.minor_version, "7.0.9");
        assert!(!shown.is_latest_version, "one node is older");
        let latest = shown.latest.unwrap();
        assert_eq!(
            (latest.name.as_str(), latest.release_note.as_str()),
            ("redis-7.0.15", "mends a crash")
        );
        assert!(shown.is_proxy_latest_version, "no proxy is listed");
        let all_new = describe(vec![node("7.0.15"), node("7.0.15")], Vec::new(), &catalogue);
        assert!(all_new.is_latest_version && !all_new.is_proxy_latest_version);
        let valkey = describe(vec![node("valkey-8.0.1")], Vec::new(), &catalogue);
        assert_eq!(
            (valkey.engine.as_str(), valkey.is_latest_version),
            ("valkey", true)
        );
    }

    #[test]
    fn a_release_that_may_not_be_had_hides_none_that_may() {
        let mut catalogue = vec![
            listed(Product::Redis, "7.0.15"),
            listed(Product::Redis, "8.2.4"),
            listed(Product::Redis, "8.4.0"),
        ];
        let latest = |catalogue: &[Artifact]| {
            let shown = describe(vec![node("7.0.15")], Vec::new(), catalogue);
            (shown.latest.map(|a| a.name), shown.is_latest_version)
        };
        assert_eq!(latest(&catalogue), (Some("redis-8.2.4".into()), false));
        catalogue.remove(1);
        assert_eq!(latest(&catalogue), (Some("redis-7.0.15".into()), true));
        catalogue.remove(0);
        assert_eq!(latest(&catalogue), (None, true), "8.4 is no upgrade of 7.0");
    }

    #[test]
    fn nodes_that_have_not_reported_are_not_called_the_latest() {
        let shown = describe(vec![node("")], vec![proxy("")], &[]);
        assert!(!shown.is_latest_version && !shown.is_proxy_latest_version);
        assert_eq!(shown.engine, "");
    }
}
