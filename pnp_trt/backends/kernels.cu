// What a sampling step does besides the networks; see docs/sampling.md, "The loop".
// One thread an element, in any order.  Every product and sum is rounded on its own, without fused multiply-add, so that latents are
// those of the host's loop for equal network outputs.  kernels.ptx is made of this file by benchmarks/kernels.py.

#define AT (blockIdx.x * blockDim.x + threadIdx.x)
#define COLUMNS 7  // input_scale, x_scale, output_scale, previous_scale, data_x, data_output, older_scale

// Which row of the table a step reads is in memory, for a graph of one step to be replayed for all: row[0] is what show
// reads, row[1] what update reads.  Each kernel writes the other's, which none of its own threads reads.

// shown[passes, count] = input_scale * x[count];  timestep[rows] = timesteps[step];  row[1] = step
extern "C" __global__ void show(float* shown, long long* timestep, const float* x, const float* table,
                                const long long* timesteps, int* row, int count, int passes, int rows) {
  int i = AT, step = row[0];
  if (i == 0) row[1] = step;
  if (i < rows) timestep[i] = timesteps[step];
  if (i >= count) return;
  float value = __fmul_rn(table[step * COLUMNS], x[i]);
  for (int pass = 0; pass < passes; ++pass) shown[pass * count + i] = value;
}

// data = data_x*x + data_output*out;  x = x_scale*x + output_scale*out (+ previous_scale*previous + older_scale*older);
// older = previous;  previous = data;  row[0] = step + 1
// w: null for one pass, else [pictures], and output is [2, count], unconditional first.  previous and older hold nothing
// of this run yet at its first one or two steps, and are not read where their scale is 0.
extern "C" __global__ void update(float* x, float* previous, float* older, const float* output, const float* w,
                                  const float* table, int* row, int count, int per_picture) {
  int i = AT, step = row[1];
  if (i == 0) row[0] = step + 1;
  if (i >= count) return;
  const float* c = table + step * COLUMNS;
  float out = output[i];
  if (w) out = __fadd_rn(out, __fmul_rn(w[i / per_picture], __fsub_rn(output[count + i], out)));
  float before = x[i];
  float after = __fadd_rn(__fmul_rn(c[1], before), __fmul_rn(c[2], out));
  if (step > 0 && c[3] != 0.0f) after = __fadd_rn(after, __fmul_rn(c[3], previous[i]));
  if (step > 1 && c[6] != 0.0f) after = __fadd_rn(after, __fmul_rn(c[6], older[i]));
  older[i] = previous[i];
  previous[i] = __fadd_rn(__fmul_rn(c[4], before), __fmul_rn(c[5], out));
  x[i] = after;
}

// bad[picture] = 1 where a value is NaN or infinite
extern "C" __global__ void check(int* bad, const float* values, int count, int per_picture) {
  int i = AT;
  if (i < count && !(fabsf(values[i]) <= 3.402823466e+38f)) bad[i / per_picture] = 1;
}

// pixels in -1 ... 1, [N, channels, plane] -> bytes [N, plane, channels]
extern "C" __global__ void to_bytes(unsigned char* bytes, const float* pixels, int count, int channels, int plane) {
  int i = AT;
  if (i >= count) return;
  int channel = i % channels, at = i / channels;
  float value = pixels[(at / plane * channels + channel) * plane + at % plane];
  value = rintf(__fmul_rn(__fadd_rn(value, 1.0f), 127.5f));
  bytes[i] = (unsigned char)fminf(fmaxf(value, 0.0f), 255.0f);
}
