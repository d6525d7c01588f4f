//! `FleetService`: what runs where. The leader knows it all; without one each controller shows the
//! agents and proxies that have their streams with it.

use slotmesh_proto::{
    fleet::v1::{self as api, fleet_service_server::FleetService},
    instance::v1::{SwitchOverRequest, instance_service_server::InstanceService},
    topology::v1::Hello,
};
use slotmesh_task::{
    admit::RefusalKind,
    drain::{self, Drain},
};
use slotmesh_topology::{HostId, InstanceId, NodeId, ProxyId};
use tonic::{Request, Response, Status, metadata::MetadataMap};
use tracing::info;

use super::{Context, instance::Instances, refuse};
use crate::leader::Leadership;

/// The service.
#[derive(Clone, Debug)]
pub struct Fleet {
    context: Context,
    instances: Instances,
}

impl Fleet {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        let instances = Instances::new(context.clone());
        Self { context, instances }
    }

    /// What can be moved off a host now; `None` when nobody knows the host.
    fn drain(&self, host: &HostId) -> Option<Drain> {
        let answering = self.context.hub.read(|fleet| fleet.hosts.clone());
        self.context.mirror.read(|state| {
            if !answering.contains(host) && !state.hosts.contains_key(host) {
                return None;
            }
            let shards = state.shards.values().map(|s| &s.value);
            let task_of = |shard: &slotmesh_topology::Shard| {
                let key = (shard.instance.clone(), shard.id.clone());
                state.locks.get(&key).cloned()
            };
            Some(drain::drain(shards, host, task_of, |h| {
                answering.contains(h)
            }))
        })
    }

    /// Begins a switchover, as if its caller had asked for it.
    async fn move_primaries(
        &self,
        metadata: MetadataMap,
        instance: &InstanceId,
        targets: &[NodeId],
    ) -> Result<String, Status> {
        let asked = SwitchOverRequest {
            instance_id: instance.to_string(),
            target_primary_node_ids: targets.iter().map(ToString::to_string).collect(),
            ..SwitchOverRequest::default()
        };
        let request = Request::from_parts(metadata, tonic::Extensions::default(), asked);
        let answer = self.instances.switch_over(request).await?;
        Ok(answer.into_inner().task_id)
    }
}

/// A primary whose switchover was refused, as one that stays.
fn refused_move(
    state: &crate::mirror::State,
    instance: &InstanceId,
    node: &NodeId,
    why: &Status,
) -> api::StayingPrimary {
    let shards = state.shards_of(instance);
    let shard = shards.iter().find(|s| s.value.member(node).is_some());
    api::StayingPrimary {
        instance_id: instance.to_string(),
        shard_id: shard.map_or_else(String::new, |s| s.value.id.to_string()),
        node_id: shard.map_or_else(String::new, |s| s.value.primary.to_string()),
        reason: why.message().to_owned(),
        // Others were at its records at the same time, or it can be asked again.
        moving: true,
    }
}

impl Fleet {
    /// It sends its clients away, or is to be removed: nothing to connect to.
    fn leaves(&self, hello: &Hello) -> bool {
        let instance: InstanceId = hello.instance_id.as_str().into();
        let proxy: ProxyId = hello.proxy_id.as_str().into();
        self.context.mirror.read(|s| {
            let known = s.instances.get(&instance);
            known.is_some_and(|i| i.value.leaving(&proxy).is_some())
        })
    }
}

#[tonic::async_trait]
impl FleetService for Fleet {
    async fn list_hosts(
        &self,
        _: Request<api::ListHostsRequest>,
    ) -> Result<Response<api::ListHostsResponse>, Status> {
        let hosts = self.context.hub.hosts();
        let hosts = self.context.mirror.read(|state| {
            let nodes_on = |host: &str| {
                let members = state.shards.values().flat_map(|s| &s.value.members);
                members.filter(|m| m.host.as_str() == host).count()
            };
            hosts
                .into_iter()
                .map(|entry| {
                    let register = entry.register;
                    api::Host {
                        node_count: u32::try_from(nodes_on(&register.host_id)).unwrap_or(u32::MAX),
                        host_id: register.host_id,
                        agent_address: register.agent_address,
                        advertise_ip: register.advertise_ip,
                        agent_version: register.agent_version,
                        engines: register.engines,
                        zone: register.zone,
                        agent_pid: register.pid,
                    }
                })
                .collect()
        });
        let doubts = self.context.hub.doubts();
        Ok(Response::new(api::ListHostsResponse {
            hosts,
            failover_brake: doubts.brake(),
            hosts_silent: u32::try_from(doubts.numbers().silent).unwrap_or(u32::MAX),
        }))
    }

    #[allow(clippy::cast_precision_loss)] // Milliseconds for people.
    async fn list_proxies(
        &self,
        request: Request<api::ListProxiesRequest>,
    ) -> Result<Response<api::ListProxiesResponse>, Status> {
        let wanted = request.into_inner().instance_id;
        let proxies = self
            .context
            .hub
            .proxies()
            .into_iter()
            .filter(|p| wanted.is_empty() || p.hello.instance_id == wanted)
            .filter(|p| !self.leaves(&p.hello))
            .map(|p| api::Proxy {
                proxy_id: p.hello.proxy_id,
                instance_id: p.hello.instance_id,
                host_id: p.hello.host_id,
                address: p.hello.address,
                admin_address: p.hello.admin_address,
                version: p.hello.version,
                pid: p.hello.pid,
                clients: p.report.clients,
                commands: p.report.commands,
                errors: p.report.errors,
                held_requests: p.report.held_requests,
                held_max_ms: p.report.held_max_us as f64 / 1000.0,
            })
            .collect();
        Ok(Response::new(api::ListProxiesResponse { proxies }))
    }

    async fn get_leader(
        &self,
        _: Request<api::GetLeaderRequest>,
    ) -> Result<Response<api::GetLeaderResponse>, Status> {
        let leadership = self.context.leadership.borrow().clone();
        Ok(Response::new(match leadership {
            Leadership::Leading { term } => api::GetLeaderResponse {
                controller_id: self.context.controller_id.clone(),
                address: self.context.address.clone(),
                term: term.number(),
            },
            Leadership::Following {
                leader: Some(leader),
                ..
            } => api::GetLeaderResponse {
                controller_id: leader.controller_id,
                address: leader.address,
                term: leader.term,
            },
            Leadership::Following { leader: None, .. } => api::GetLeaderResponse::default(),
        }))
    }

    async fn drain_host(
        &self,
        request: Request<api::DrainHostRequest>,
    ) -> Result<Response<api::DrainHostResponse>, Status> {
        self.context.leading()?;
        let (metadata, _, request) = request.into_parts();
        let host = HostId::from(request.host_id.as_str());
        let Some(drain) = self.drain(&host) else {
            return Err(refuse(
                RefusalKind::NotFound,
                "HOST_NOT_FOUND",
                format!("no host is called {host}; ListHosts names them"),
            ));
        };
        let mut answer = api::DrainHostResponse {
            primaries: u32::try_from(drain.primaries()).unwrap_or(u32::MAX),
            busy: u32::try_from(drain.busy).unwrap_or(u32::MAX),
            ..api::DrainHostResponse::default()
        };
        let stays = drain.stays.into_iter().map(|stay| api::StayingPrimary {
            instance_id: stay.instance.to_string(),
            shard_id: stay.shard,
            node_id: stay.node.to_string(),
            reason: stay.reason,
            moving: stay.moving,
        });
        answer.stays = stays.collect();
        for (instance, targets) in &drain.moves {
            let moved = self.move_primaries(metadata.clone(), instance, targets);
            match moved.await {
                Ok(task) => {
                    info!(%host, task, %instance, shards = targets.len(), "a host is drained");
                    answer.task_ids.push(task);
                }
                Err(status) => self.context.mirror.read(|state| {
                    let stays = targets
                        .iter()
                        .map(|node| refused_move(state, instance, node, &status));
                    answer.stays.extend(stays);
                }),
            }
        }
        answer.settled = answer.task_ids.is_empty()
            && answer.busy == 0
            && answer.stays.iter().all(|stay| !stay.moving);
        Ok(Response::new(answer))
    }
}
