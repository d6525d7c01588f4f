//! `FleetService`: what runs where. The leader knows it all; without one each controller shows the
//! agents and proxies that have their streams with it.

use slotmesh_proto::fleet::v1::{self as api, fleet_service_server::FleetService};
use tonic::{Request, Response, Status};

use super::Context;
use crate::leader::Leadership;

/// The service.
#[derive(Clone, Debug)]
pub struct Fleet {
    context: Context,
}

impl Fleet {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
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
}
