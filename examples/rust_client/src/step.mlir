// A step of gradient descent for y = x w: of the sum of all ranks' gradients.
module @step {
  func.func public @main(%w: tensor<2xf32>, %x: tensor<4x2xf32>, %y: tensor<4xf32>)
      -> tensor<2xf32> {
    %guess = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0]
      : (tensor<4x2xf32>, tensor<2xf32>) -> tensor<4xf32>
    %error = stablehlo.subtract %guess, %y : tensor<4xf32>
    %own = stablehlo.dot_general %error, %x, contracting_dims = [0] x [0]
      : (tensor<4xf32>, tensor<4x2xf32>) -> tensor<2xf32>
    // The sum is operation 0 (include/mpi_cuda.h).
    %sum = stablehlo.custom_call @mpi_cuda_allreduce(%own) {api_version = 4 : i32,
      has_side_effect = true, backend_config = {comm = 0 : i64, op = 0 : i64}}
      : (tensor<2xf32>) -> tensor<2xf32>
    %rate = stablehlo.constant dense<0.15> : tensor<2xf32>
    %change = stablehlo.multiply %sum, %rate : tensor<2xf32>
    %next = stablehlo.subtract %w, %change : tensor<2xf32>
    return %next : tensor<2xf32>
  }
}
