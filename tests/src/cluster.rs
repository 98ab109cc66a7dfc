//! Two nodes with an agent each, and one switch between them and the server.
use anyhow::Result;

use crate::{
    agent::{Agent, Hook, Setup},
    fixture::Mac,
    node::Node,
    scene::Scene,
    server::{Place, Server, ServerKind},
    world::World,
};

/// What the switch calls its ports to the nodes.
pub const NODES: [&str; 2] = ["node1", "node2"];

/// `scene` is node 1; what is beyond it is here.
pub struct Cluster {
    pub scene: Scene,
    pub second: Agent,
    pub node2: Node,
    pub switch: Node,
}

impl Cluster {
    pub fn new(args: &[&str]) -> Result<Self> {
        let node1 = Node::new()?;
        let node2 = Node::elsewhere(Mac([2, 0xdc, 0, 0, 2, 1]))?;
        let switch = Node::elsewhere(Mac([2, 0xdc, 0, 0, 3, 1]))?;
        node1.cable_to(&switch, NODES[0], Mac([2, 0xdc, 0, 0, 1, 2]))?;
        node2.cable_to(&switch, NODES[1], Mac([2, 0xdc, 0, 0, 2, 2]))?;
        let server = Server::start(&switch, ServerKind::Dnsmasq, Place::Remote, 20)?;
        let second = Setup::new(Place::Remote, Hook::Tc)
            .on(&node2.netns, "agent2")?
            .quick()
            .args(args)
            .start()?;
        let world = World {
            node: node1,
            server,
        };
        Ok(Self {
            scene: Scene::in_world(world, args)?,
            second,
            node2,
            switch,
        })
    }
}
