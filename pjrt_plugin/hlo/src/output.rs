//! A computation while it is rewritten: new instructions, and pairs with the token.

use std::collections::HashMap;

use protobuf::MessageField;

use crate::error::Refused;
use crate::module::Module;
use crate::proto::hlo::{HloInstructionProto, ShapeProto};
use crate::shape::{TOKEN, shape_of, token, tuple};

/// A computation while it is rewritten.
pub(crate) struct Output<'a> {
    module: &'a mut Module,
    pub(crate) computation: i64,
    /// Ids of the instructions that were there before.
    ids: Vec<i64>,
    pub(crate) instructions: Vec<HloInstructionProto>,
    shapes: HashMap<i64, ShapeProto>,
}

impl<'a> Output<'a> {
    /// An empty computation in place of `computation`, which has the instructions `before`.
    pub(crate) fn new(
        module: &'a mut Module,
        computation: i64,
        before: &[HloInstructionProto],
    ) -> Output<'a> {
        Output {
            module,
            computation,
            ids: before.iter().map(|instruction| instruction.id).collect(),
            instructions: Vec::with_capacity(before.len() + 8),
            shapes: HashMap::new(),
        }
    }

    pub(crate) fn push(&mut self, instruction: HloInstructionProto) -> i64 {
        let id = instruction.id;
        self.shapes.insert(id, shape_of(&instruction));
        self.instructions.push(instruction);
        id
    }

    pub(crate) fn fresh(&mut self) -> i64 {
        self.module.fresh_id(&self.instructions, &self.ids)
    }

    fn shape(&self, id: i64) -> Result<ShapeProto, Refused> {
        self.shapes.get(&id).cloned().ok_or_else(|| {
            Refused::inconsistent(format!("instruction {id} is used before it is there"))
        })
    }

    pub(crate) fn is_token(&self, id: i64) -> bool {
        let shape = self.shapes.get(&id);
        shape.is_some_and(|shape| shape.element_type == TOKEN)
    }

    /// A new instruction; `id` may be that of one that it stands for.
    pub(crate) fn make(
        &mut self,
        id: Option<i64>,
        opcode: &str,
        shape: ShapeProto,
        operands: &[i64],
        edit: impl FnOnce(&mut HloInstructionProto),
    ) -> i64 {
        let own = id.unwrap_or_else(|| self.fresh());
        let mut instruction = HloInstructionProto {
            name: format!("mpi_cuda.{opcode}.{}.{own}", self.computation),
            opcode: opcode.into(),
            shape: MessageField::some(shape),
            id: own,
            operand_ids: operands.to_vec(),
            ..Default::default()
        };
        edit(&mut instruction);
        self.push(instruction)
    }

    pub(crate) fn element(
        &mut self,
        id: Option<i64>,
        name: Option<String>,
        of: i64,
        index: usize,
    ) -> Result<i64, Refused> {
        let shape = self.shape(of)?.tuple_shapes.get(index).cloned();
        let shape =
            shape.ok_or_else(|| Refused::inconsistent(format!("{of} has no element {index}")))?;
        Ok(self.make(id, "get-tuple-element", shape, &[of], |made| {
            made.tuple_index = index as i64;
            if let Some(name) = name {
                made.name = name;
            }
        }))
    }

    /// `first` paired with the token `second`.
    pub(crate) fn pair(&mut self, first: i64, second: i64) -> Result<i64, Refused> {
        let shape = tuple(vec![self.shape(first)?, token()]);
        Ok(self.make(None, "tuple", shape, &[first, second], |_| {}))
    }

    /// Pushes `instruction` under a new id, with the token paired to its result. Its old id is that
    /// of the first element. Returns the token.
    pub(crate) fn push_paired(
        &mut self,
        mut instruction: HloInstructionProto,
    ) -> Result<i64, Refused> {
        let (old, name) = (instruction.id, instruction.name.clone());
        instruction.id = self.fresh();
        instruction.name = format!("{name}.mpi_cuda");
        instruction.shape = MessageField::some(tuple(vec![shape_of(&instruction), token()]));
        let paired = self.push(instruction);
        self.element(Some(old), Some(name), paired, 0)?;
        self.element(None, None, paired, 1)
    }
}
