//! Real processes for tests: etcd, redis-server, and whole meshes through `slotmesh up`.
//!
//! Whatever a value of this crate started is gone when the value is dropped, found by pid and by
//! the directory it works in, never by its name: other tests run the same programs at the same time.

pub mod engines;
pub mod etcd;
pub mod etcd_cluster;
pub mod foreign;
pub mod mesh;
pub mod ports;
pub mod programs;
pub mod redis_server;
pub mod signals;
pub mod wait;

pub use etcd::Etcd;
pub use etcd_cluster::EtcdCluster;
pub use mesh::{Mesh, MeshOptions};
pub use redis_server::RedisServer;
pub use wait::wait_until;
